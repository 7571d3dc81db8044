"""What the entries share: the race, and what a row says about where it was measured."""

import pytest
import torch

from benchmarks.race import DEVICE, enter


def _case(item: pytest.Item) -> str:
    """What the entries of one race have in common: benchmark and parameters but the provider."""
    values = [value for name, value in item.callspec.params.items() if name != "provider"]
    return f"{item.originalname.removeprefix('bench_')} {', '.join(values)}"


@pytest.fixture
def case(request, benchmark):
    """What the entry shares with its rivals, as the name of their group; the row says it too."""
    benchmark.group = _case(request.node)
    benchmark.extra_info |= request.node.callspec.params | {"device": DEVICE}
    return benchmark.group


@pytest.fixture
def race(request, benchmark, case):
    """``race(make, flops)``: this entry's part in the race of its case (see benchmarks/race.py).

    ``make()`` gives the case's providers by name; ``flops`` is the useful arithmetic of a step,
    without what a provider computes twice, and ``moved`` the bytes, where that is the question.
    The others in the race are the entries selected.
    """
    entries = [item for item in request.session.items if "race" in item.fixturenames]
    rivals = [item.callspec.params["provider"] for item in entries if _case(item) == case]

    def run(make, flops=None, moved=None):
        name = request.node.callspec.params["provider"]
        result = enter(benchmark, case, name, make, rivals)
        benchmark.extra_info |= {"role": result.role, "max_error": result.error}
        if benchmark.enabled:
            rates = {"gflop_per_s": flops, "gb_per_s": moved}
            billions_per_s = 1e-9 / benchmark.stats.stats.median
            benchmark.extra_info |= {k: n * billions_per_s for k, n in rates.items() if n}

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    """Processor, versions and threads; no names of hosts."""
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
