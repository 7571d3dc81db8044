"""What a row says about where it was measured: processor, versions, threads; no names of hosts."""

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info.get("cpu", {})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    kept = {
        "cpu": cpu.get("brand_raw", machine_info.get("processor")),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": machine_info.get("python_version"),
        "torch": torch.__version__,
    }
    machine_info.clear()
    machine_info.update(kept)
