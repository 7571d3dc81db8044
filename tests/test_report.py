"""``python -m benchmarks report``: pages, plots and documents follow from rows and nothing else."""

import copy
import itertools
import json
import re
import shutil

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks import measure, race, rows
from benchmarks.__main__ import main
from benchmarks.report import drawing, plots
from benchmarks.report import pages as report
from benchmarks.report.tables import races, summary

PEERS = ["literal", "literal, torch.compile", "SDPA", "SDPA, torch.compile", "FlexAttention"]
SPREAD = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a provider's durations around its median
NONE = pytest.param("", marks=pytest.mark.skip(reason=f"no {report.ROWS} under benchmarks/results"))
COMMITTED = [path.name for path in report.with_rows()] or [NONE]
SIZES = {"batch": 1, "tokens": 256, "depth": 1, "resolution": 256}


def result(milliseconds, role="peer", peak=None, **others):
    durations = [1e-3 * milliseconds * part for part in SPREAD]
    return race.Result(role, error=1e-7, durations=durations, peak_mib=peak, **others)


def missing(reason):
    return race.Result(status="missing", reason=reason)


def case_rows(benchmark, parameters, results, dtype="float32", **facts):
    """A race's rows as the harness writes them, with durations made up."""
    name = f"{benchmark} {', '.join([*parameters.values(), dtype])}"
    facts = {"sizes": SIZES, **facts}
    about = race.Case(name, benchmark, {**parameters, "dtype": dtype}, dtype, **facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "_races", {name: results})
        patch.setattr(measure, "arithmetic", lambda dtype: 4e11)
        patch.setattr(measure, "bandwidth", lambda: 2e10)
        found = [race.row(about, provider, part) for provider, part in results.items()]
    return [json.loads(json.dumps(row)) for row in found]


def attention_rows(shape, direction, dtype):
    """Five peers, a floor and two of ours, the literal equations 80 times as slow as the best."""
    results = {name: result(7 + i, peak=200 + i) for i, name in enumerate(PEERS)}
    results["literal"] = result(320, peak=400)
    results["FlexAttention"] = missing("trains on a GPU only")
    results["SDPA without bias"] = result(3, "floor", 50)
    results |= {"fused, eager": result(24, "ours", 150), "fused, native": result(4, "ours", 100)}
    parameters = {"shape": shape, "direction": direction}
    return case_rows("window_attention", parameters, results, dtype, flops=1e9, moved=2e7)


def all_rows():
    """Each benchmark's rows, with all that makes a table or a plot difficult."""
    cases = itertools.product(["16x16"], race.DIRECTIONS, ("float32", "bfloat16"))
    found = [row for case in cases for row in attention_rows(*case)]
    wins = {"literal": result(4), "SDPA": result(2), "fused, native": result(4, "ours")}
    wrong = {"status": "refused", "reason": "result 0: error 0.5, allowed 1e-6: not timed"}
    refused = {"literal": result(4), "SDPA": race.Result(**wrong)}
    ours_refused = {"literal": result(4), "fused, native": race.Result("ours", **wrong)}
    for shape, results in (("256px", wins), ("512px", refused), ("1024px", ours_refused)):
        found += case_rows("block", {"shape": shape}, results, flops=1e9)
    step = {"literal": result(9, peak=90), "fused, native": result(3, "ours", 30)}
    found += case_rows("training", {"shape": "256px", "depth": "28"}, step, flops=1e9)
    found += case_rows("sampling", {"model": "digits"}, step, sizes=SIZES | {"steps": 6})
    for benchmark, size in (("batch", "batch"), ("tokens", "tokens"), ("depth", "depth")):
        for n in (1, 2, 4):
            grown = {
                "literal": result(9 * n, peak=90 * n**2),
                "fused": result(3 * n, "ours", 30 * n),
            }
            sizes = SIZES | {size: SIZES[size] * n, "resolution": 128 * n}
            found += case_rows(f"scaling_{benchmark}", {size: str(n)}, grown, sizes=sizes)
    for dtype in ("float32", "bfloat16"):
        floor = {"torch.mm": result(5, "floor")}
        found += case_rows("large_product", {}, floor, dtype, flops=2e9)
    floor = {"Tensor.copy_": result(8, "floor")}
    return found + case_rows("copy", {"size": "64 MiB"}, floor, moved=2**27)


@pytest.fixture(scope="module")
def made():
    return all_rows()


@pytest.fixture(scope="module")
def reported(made, tmp_path_factory):
    """A device's folder with rows, page and plots, to be copied."""
    path = tmp_path_factory.mktemp("reported")
    write(path, made)
    assert report.update(path)
    return path


@pytest.fixture
def folder(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "results" / "SOME_DEVICE")


def write(path, found):
    (path / report.ROWS).unlink(missing_ok=True)
    rows.append(path / report.ROWS, found)


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def page(found):
    return report.page(races(found))


def test_a_line_has_medians_ratios_and_the_best_peer(made):
    expected = (
        "| 16x16, forward, float32 | 320 (1.00×) | 8 (40.00×) | 9 (35.56×) | 10 (32.00×) "
        "| 3 (106.67×) | 24 (13.33×) | 4 (80.00×) | literal, torch.compile | 2.00× "
        "| 62 % (arithmetic) |"
    )
    assert expected in page(made).splitlines()
    assert "| digits, float32 | 9, 666.7 steps/s (1.00×) | 3, 2000 steps/s (3.00×) |" in page(made)
    assert "| bfloat16 | 5 (400 GFLOP/s) |" in page(made)
    assert "| 64 MiB, float32 | 8 (16.78 GB/s) |" in page(made)
    assert "| 256px, depth 28, float32 | 90 (1.00×) | 30 (3.00×) | literal | 3.00× |" in page(made)


def test_the_page_says_where_and_by_what_it_was_measured(made):
    origin = page(made).splitlines()[2]
    here = rows.where()
    for name in ("device", "torch", "python", "sources" if here["dirty"] else "commit"):
        assert str(here[name])[:10] in origin
    changed = copy.deepcopy(made)
    changed[0] |= {"commit": "0123456789abcdef", "dirty": True, "driver": "580.1", "cuda": "13.0"}
    origin = page(changed).splitlines()[2]
    assert "0123456789 with changes" in origin
    assert "driver 580.1" in origin and "CUDA 13.0" in origin


@pytest.mark.parametrize("field", ["median_s", "peak_mib"])
def test_every_number_comes_from_its_row(made, field):
    before = page(made)
    for place, row in enumerate(made):
        if row[field] is None:
            continue
        changed = [*made[:place], row | {field: 1.7 * row[field]}, *made[place + 1 :]]
        assert page(changed) != before, (row["case"], row["provider"])


def test_a_peer_that_wins_is_shown_as_winning(made):
    assert re.search(r"\| 256px, float32 \|.*\| SDPA \| \*\*0\.50×\*\* \|", page(made))
    text = summary(races(made))
    assert "| block 256px, float32 | fused, native | 4 | 1.00× | **0.50×** | SDPA |" in text
    assert (
        "| window attention 16x16, forward, float32 | fused, native | 4 | 80.00× | 2.00× |" in text
    )


def test_a_provider_that_was_not_timed_is_listed_with_the_reason(made):
    listed = page(made).partition("## Not timed")[2].strip().splitlines()
    wrong = "result 0: error 0.5, allowed 1e-6: not timed"
    assert listed == [
        f"- refused: SDPA (block 512px, float32): {wrong}",
        f"- refused: fused, native (block 1024px, float32): {wrong}",
        "- missing: FlexAttention (all of window_attention): trains on a GPU only",
    ]
    assert "| 512px, float32 | 4 (1.00×) | refused |" in page(made)
    assert "| block 1024px, float32 | **none** (fused, native: refused) |" in (summary(races(made)))


def test_rows_of_other_code_in_a_race_are_pointed_at(made):
    assert "different code" not in page(made)
    changed = [made[0] | {"sources": "another"}, *made[1:]]
    assert "**Rows of different code, no races**: window_attention 16x16" in page(changed)


def test_a_reason_shows_as_it_is(made):
    changed = [made[0] | {"status": "failed", "reason": "no <b>*x*</b> | `y`"}, *made[1:]]
    assert r": no \<b\>\*x\*\</b\> \| \`y\`" in page(changed)


def test_a_second_report_changes_nothing(folder):
    first = contents(folder)
    assert {path.suffix for path in first} == {".jsonl", ".md", ".svg"}
    assert report.update(folder) == []
    assert contents(folder) == first


def test_whatever_the_user_has_set_plots_are_the_same_to_the_byte(made):
    drawn = plots.plots(races(made))
    once = {name: plot.svg() for name, plot in drawn.items()}
    assert set(once) == {"scaling", "roofline", "memory"} | {
        f"bars_{name}" for name in ("window_attention", "block", "training", "sampling")
    }
    again = plots.plots(races(json.loads(json.dumps(made))))
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.grid": True}):
        assert {name: plot.svg() for name, plot in again.items()} == once
    for name, plot in drawn.items():
        assert plot.digest in re.search(rb"<dc:description>(.*)<", once[name])[1].decode()


@pytest.mark.parametrize(
    ("plot", "entry", "field"),
    [
        ("bars_window_attention", "window_attention", "median_s"),
        ("bars_window_attention", "window_attention", "p80_s"),
        ("scaling", "scaling_batch", "median_s"),
        ("scaling", "scaling_tokens", "p20_s"),
        ("memory", "scaling_tokens", "peak_mib"),
        ("memory", "training", "peak_mib"),
        ("roofline", "large_product", "tflop_per_s"),
        ("roofline", "copy", "gb_per_s"),
    ],
)
def test_a_plot_is_stale_when_a_number_in_it_changes(folder, made, plot, entry, field):
    place = next(i for i, row in enumerate(made) if row["benchmark"] == entry and row[field])
    row = made[place]
    write(folder, [*made[:place], row | {field: 1.7 * row[field]}, *made[place + 1 :]])
    assert folder / "plots" / f"{plot}.svg" in report.update(folder, check=True)


def test_check_says_what_is_stale_and_writes_nothing(folder, capsys):
    page, plot = folder / "README.md", folder / "plots" / "memory.svg"
    assert main(["report", "--check", str(folder)]) == 0
    page.write_text(page.read_text().replace("40.00×", "41.00×"))
    plot.unlink()
    (folder / "plots" / "bars_gone.svg").write_text("of rows that are no more")
    (folder / "plots" / "drawn_by_hand.svg").write_text("not ours")
    before = contents(folder)
    capsys.readouterr()
    assert main(["report", "--check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert re.findall("stale: .*/(.*)", said) == ["bars_gone.svg", "memory.svg", "README.md"]
    assert contents(folder) == before
    assert main(["report", str(folder)]) == 0
    assert main(["report", "--check", str(folder)]) == 0
    assert {path.name for path in contents(folder)} >= {"memory.svg", "drawn_by_hand.svg"}
    assert not (folder / "plots" / "bars_gone.svg").exists()


def test_a_torn_last_line_is_passed_over(folder):
    with open(folder / report.ROWS, "a") as file:
        file.write('{"benchmark": "block", "case": "blo')
    assert report.update(folder, check=True) == []


def test_a_plot_without_rows_is_not_drawn(folder, made):
    write(folder, [row for row in made if row["benchmark"] in ("block", "copy")])
    report.update(folder)
    assert [path.name for path in (folder / "plots").iterdir()] == ["bars_block.svg"]
    assert "bars_training" not in (folder / "README.md").read_text()
    write(folder, [row for row in made if row["benchmark"] == "copy"])
    report.update(folder)
    assert not list((folder / "plots").iterdir())


def test_one_size_alone_is_no_scaling(made):
    every = [row for row in made if row["benchmark"].startswith("scaling_")]
    assert plots.plots(races(every)).keys() == {"scaling", "memory"}
    first = [row for row in every if "1" in row["parameters"].values()]
    assert first and not plots.plots(races(first))


def test_no_rows_or_rows_of_two_devices_are_an_error(folder, made, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path)])
    assert "no rows there" in capsys.readouterr().err
    write(folder, [*made[1:], made[0] | {"device": "another"}])
    with pytest.raises(ValueError, match=r"rows of several devices, .*another"):
        report.update(folder)


def test_markers_are_filled(folder, tmp_path):
    document = tmp_path / "docs" / "README.md"
    document.parent.mkdir()
    document.write_text(
        "before\n<!-- rows: summary SOME_DEVICE bfloat16 -->\nstale text\n<!-- /rows -->\nbetween\n"
        "<!-- rows: plots memory scaling -->\n<!-- /rows -->\nafter\n"
    )
    results = folder.parent
    assert report.update_document(document, True, results) == [document]
    assert "stale text" in document.read_text()
    assert report.update_document(document, False, results) == [document]
    assert report.update_document(document, True, results) == []
    text = document.read_text()
    assert text.startswith("before\n<!-- rows: summary SOME_DEVICE bfloat16 -->\n\n| case |")
    assert "| window attention 16x16, forward+backward, bfloat16 |" in text
    assert "stale text" not in text and "float32 |" not in text
    assert "(../results/SOME_DEVICE/README.md)" in text
    assert "![Peak memory](../results/SOME_DEVICE/plots/memory.svg)" in text
    assert "scaling.svg" in text and "roofline.svg" not in text
    assert text.endswith("\n\n<!-- /rows -->\nafter\n")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- rows: sumary -->\n<!-- /rows -->", "line 1: .*'sumary' is none of summary, plots"),
        ("<!-- rows: -->\n<!-- /rows -->", "'' is none of summary, plots"),
        ("x\n<!-- rows: summary -->\n", "line 2: .*never closed"),
        ("x\n\n<!-- /rows -->\n", "line 3: .*closes nothing"),
        ("<!-- rows: summary -->\n<!-- rows: plots -->\n<!-- /rows -->", "line 2: .*is open"),
        ("<!-- rows: summary float99 -->\n<!-- /rows -->", "there is no 'float99' in .*rows.jsonl"),
        ("<!-- rows: plots pie -->\n<!-- /rows -->", "there is no 'pie' in"),
    ],
)
def test_a_wrong_marker_is_an_error_that_says_so(folder, text, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        report.fill(text, tmp_path / "NOTES.md", folder.parent)


def test_a_marker_names_its_folder_where_several_have_rows(folder, made, tmp_path):
    write(folder.parent / "OTHER", made)
    text = "<!-- rows: plots{} -->\n<!-- /rows -->"
    with pytest.raises(ValueError, match=r"one folder .*: OTHER, SOME_DEVICE"):
        report.fill(text.format(""), tmp_path / "NOTES.md", folder.parent)
    filled = report.fill(text.format(" OTHER"), tmp_path / "NOTES.md", folder.parent)
    assert "results/OTHER/plots/" in filled and "SOME_DEVICE" not in filled
    with pytest.raises(ValueError, match=r"one folder .*: none"):
        report.fill(text.format(""), tmp_path / "NOTES.md", tmp_path)


def test_no_text_of_a_plot_covers_another_or_leaves_the_picture(made, monkeypatch):
    boxes, draw = {}, Text.draw

    def spy(self, renderer):
        if self.get_visible() and self.get_text():
            boxes[id(self)] = self.get_text(), self.get_window_extent(renderer).padded(-0.5)
        return draw(self, renderer)

    monkeypatch.setattr(Text, "draw", spy)
    for name, plot in plots.plots(races(made)).items():
        boxes.clear()
        with drawing.style():
            figure = plot.draw(plot.numbers)
            FigureCanvasAgg(figure).draw()
        assert len(boxes) > 8
        for text, box in boxes.values():
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, (name, text)
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, (name, text)
        for (text, box), (other, its_box) in itertools.combinations(boxes.values(), 2):
            assert not box.overlaps(its_box), (name, text, other)


@pytest.mark.parametrize("committed", COMMITTED)
def test_committed_results_are_as_their_rows_say(committed):
    assert report.run([rows.RESULTS / committed], check=True) == 0


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_as_the_committed_rows_say(document):
    assert report.update_document(document, check=True) == []
