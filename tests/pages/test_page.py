"""What a page says of its runs, and that nothing in a run can become part of the page."""

import csv
import html.parser
import json
import math
import re
import urllib.parse

import pytest
from tensorboardX.proto.event_pb2 import Event

from lora_diffusion_jax.evaluation import results
from lora_diffusion_jax.pages import collect, page, tables, tensorboard
from tests.pages.browser import CHROMIUM, Browser
from tests.pages.runs import make_run

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "{{ 7 * 7 }}{% raw %}",
    "=HYPERLINK(1)",
    "a|b <b>`c`\n| d",
)


@pytest.fixture
def sweep(tmp_path):
    """Two ranks, two seeds; the last has no evaluation yet."""
    changes = [{"lora.rank": rank, "train.seed": seed} for rank in (10, 9) for seed in (0, 1)]
    names = [f"rank={c['lora.rank']},seed={c['train.seed']}" for c in changes]
    losses, distances = (1.0, 3.0, 2.0, 2.5), (5.0, 8.0, 1.5, None)
    sources = [
        make_run(tmp_path, name, change, loss=loss, fd=distance)
        for name, change, loss, distance in zip(names, changes, losses, distances, strict=True)
    ]
    return tmp_path, sources


def test_a_run_is_read_from_its_directory(sweep):
    folder, sources = sweep
    run = collect.collect(sources[0])
    assert (run.images, run.total, run.parameters) == (300, 300, 1234)
    assert run.metrics == {"train/loss": pytest.approx(4 / 3), "eval/fd_100": 5.0}
    assert run.curves["train/loss"] == [(100, 4.0), (200, 2.0), (300, pytest.approx(4 / 3))]
    assert run.rate == 200.0  # the median of 100, 200 and 300
    assert run.seconds == pytest.approx(100 / 100 + 100 / 200 + 100 / 300 + 3)
    assert run.gflop == pytest.approx(200 / 300)  # 0.2 TFLOP/s at 300 img/s
    assert run.samples == "samples/0000000300.png"
    record = {"metric": "fid_50k", "step": 30, "value": 2.25}
    results.append(results.results_file(sources[0].directory), record)
    assert collect.collect(sources[0]).metrics["fid_50k"] == 2.25


def test_what_is_missing_or_damaged_is_left_out(tmp_path):
    source = collect.Source("new", tmp_path / "new", {"lora.rank": 1}, "waiting")
    run = collect.collect(source)
    assert (run.images, run.total, run.parameters, run.seconds) == (0, 0, None, None)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("{")
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 3, "images": "x", "eval/a": "b"}\n{')
    page.write(tmp_path, "damaged", [source])
    assert "lora.rank" in (tmp_path / "index.html").read_text()


def test_seeds_are_summed_up_by_mean_and_sample_deviation(sweep):
    _, sources = sweep
    first, second = collect.spreads([collect.collect(source) for source in sources])
    assert first.changes == {"lora.rank": 10}
    assert first.metrics["eval/fd_100"] == (2, 6.5, pytest.approx(math.sqrt(4.5)))
    assert "eval/fd_100" not in second.metrics  # one run alone has it
    assert second.metrics["train/loss"][1] == pytest.approx(2.25 * 4 / 3)


def test_pictures_of_analyses_and_comparisons_are_shown(sweep):
    folder, sources = sweep
    assert "What the adapters do" not in page_of(sweep)
    for directory in (sources[1].directory / "analysis", folder / "compare"):
        directory.mkdir()
        (directory / "a b.png").write_bytes(b"")
        (directory / "a.npz").write_bytes(b"")
    text = page_of(sweep)
    assert re.findall(r'src="([^"]*a%20b[^"]*)"', text) == [
        "./compare/a%20b.png",
        f"./{urllib.parse.quote(sources[1].name)}/analysis/a%20b.png",
    ]
    assert "a.npz" not in text


def page_of(sweep):
    page.write(sweep[0], "sweep", sweep[1])
    return (sweep[0] / "index.html").read_text()


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(k, float(k)) for k in range(10_001)]
    found = collect.thinned(points)
    assert len(found) == collect.MAX_POINTS
    assert found[0] == points[0]
    assert found[-1] == points[-1]
    assert max(b[0] - a[0] for a, b in zip(found, found[1:], strict=False)) <= 26


def test_the_tables_hold_the_numbers_in_full(sweep):
    folder, sources = sweep
    page.write(folder, "two ranks", sources)
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [source.name for source in sources]
    assert float(rows[0]["train/loss"]) == 4 / 3
    assert rows[3]["eval/fd_100"] == ""
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(sources)
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1


class Elements(html.parser.HTMLParser):
    """The elements and attributes of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [""], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        self.text[self.tags[-1]] = self.text.get(self.tags[-1], "") + data


@pytest.fixture
def hostile(tmp_path):
    """A sweep whose every text is hostile, and a harmless one of the same shape."""
    pages = []
    for kind in (HOSTILE, ["x"] * len(HOSTILE)):
        root = tmp_path / str(len(pages))
        sources = []
        for number, text in enumerate(kind):
            metrics = {f"eval/{text}": 1.0, f"train/loss{text}": 2.0}
            source = make_run(root, f"run{number}", {f"data.{text}": text}, more=metrics)
            shown = (text, source.directory, source.changes, "failed", text, f"main.py {text}")
            sources.append(collect.Source(*shown, settings={text: text}))
        page.write(root, kind[0], sources)
        pages.append(root)
    return pages


def test_values_of_runs_cannot_add_to_the_page(hostile):
    found, harmless = (Elements((root / "index.html").read_text()) for root in hostile)
    assert set(found.tags) == set(harmless.tags)
    assert found.tags.count("script") == harmless.tags.count("script") == 2
    assert not [a for a in found.attributes if a[1].startswith("on")]
    data = re.search(
        r'id="data">(.*?)</script>', (hostile[0] / "index.html").read_text(), re.DOTALL
    )
    runs = json.loads(data[1])["runs"]
    assert [run["name"] for run in runs] == list(HOSTILE)  # whole, though escaped
    assert "window.hacked" not in page._HERE.joinpath("page.js").read_text()


def test_values_of_runs_cannot_become_formulas_or_columns(hostile):
    with (hostile[0] / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@", "-"))]
    assert "'=HYPERLINK(1)" in rows[1 + HOSTILE.index("=HYPERLINK(1)")]
    table = tables.Table(["a"], [[tables.Cell("-1.5", -1.5)], [tables.Cell("-x")]])
    assert tables.to_csv(table).splitlines() == ["a", "-1.5", "'-x"]
    text = (hostile[0] / "table.md").read_text()
    assert len(text.splitlines()) == 2 + len(HOSTILE)
    assert not re.search(r"(?<!\\)<", text)


def test_the_page_takes_nothing_from_elsewhere(sweep):
    folder, sources = sweep
    page.write(folder, "alone", sources)
    found = Elements((folder / "index.html").read_text())
    links = [value for _, name, value in found.attributes if name in ("src", "href")]
    assert links
    assert all((folder / value).exists() for value in map(page.urllib.parse.unquote, links))
    policy = dict(a[1:] for a in found.attributes if a[0] == "meta")["content"]
    assert "link" not in found.tags
    assert policy
    assert "http" not in found.text["style"]


def test_tensorboard_gets_fields_and_metrics(sweep):
    folder, sources = sweep
    runs = [collect.collect(source) for source in sources]
    for _ in range(2):  # the second replaces the first
        tensorboard.write_hparams(folder, runs)
    (path,) = (folder / "hparams" / sources[0].name).iterdir()
    values = []
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        values += Event.FromString(data[12 : 12 + length]).summary.value
        data = data[16 + length :]
    scalars = {v.tag: v.simple_value for v in values if not v.tag.startswith("_hparams_")}
    assert scalars == {"train/loss": pytest.approx(4 / 3), "eval/fd_100": 5.0}
    start = next(v for v in values if v.tag == "_hparams_/session_start_info")
    assert b"lora.rank" in start.metadata.plugin_data.content


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as found:
        yield found


def column(browser, number):
    script = (
        f"[...document.querySelectorAll('#runs tbody tr')].map(r => r.cells[{number}].textContent)"
    )
    return browser.run(script)


@needs_browser
def test_in_a_browser_the_table_sorts_and_runs_are_switched_off(sweep, browser):
    folder, sources = sweep
    page.write(folder, "two ranks", sources)
    browser.open((folder / "index.html").as_uri())
    titles = browser.run("[...document.querySelectorAll('#runs th')].map(h => h.textContent)")
    rank, fd = titles.index("lora.rank"), titles.index("eval/fd_100")
    assert column(browser, rank) == ["10", "10", "9", "9"]
    browser.run(f"document.querySelectorAll('#runs th button')[{rank}].click()")
    assert column(browser, rank) == ["9", "9", "10", "10"]  # as numbers, not as text
    for expected in (["1.5", "5", "8", ""], ["8", "5", "1.5", ""]):  # what is not known stays last
        browser.run(f"document.querySelectorAll('#runs th button')[{fd}].click()")
        assert column(browser, fd) == expected
    curves = "document.querySelectorAll('.chart')[0].querySelectorAll('path').length"
    assert browser.run(curves) == 4
    browser.run("document.querySelectorAll('#switches input')[1].click()")
    assert browser.run(curves) == 3
    browser.run("document.getElementById('none').click()")
    assert browser.run(curves) == 0
    browser.run("document.getElementById('all').click()")
    browser.run("document.querySelectorAll('#switches input')[0].click()")
    browser.open(browser.run("location.href"))  # choices outlive a reload
    assert browser.run(curves) == 3
    assert column(browser, fd) == ["8", "5", "1.5", ""]
    browser.run("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    images = (
        "Promise.all([...document.images].map(i => i.decode())).then(() => document.images.length)"
    )
    found = browser.call("Runtime.evaluate", expression=images, awaitPromise=True)
    assert found["result"]["value"] == 4
    assert browser.messages == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_the_page_fits_a_telephone_light_and_dark(sweep, browser, dark):
    folder, sources = sweep
    page.write(folder, "a-long-name" * 10, sources)
    for width in (1280, 400):
        browser.open((folder / "index.html").as_uri(), width, dark)
        assert browser.run("document.documentElement.scrollWidth") <= width
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 765
    assert (brightness < 0.2) if dark else (brightness > 0.9)


@needs_browser
def test_in_a_browser_hostile_values_stay_text(hostile, browser):
    browser.open((hostile[0] / "index.html").as_uri())
    assert browser.run("window.hacked") is None
    assert column(browser, 0) == list(HOSTILE)
    assert browser.run("document.querySelectorAll('#switches label').length") == len(HOSTILE)
    assert browser.messages == []


@needs_browser
def test_in_a_browser_a_page_of_running_runs_offers_to_follow_them(sweep, browser):
    folder, sources = sweep
    running = [collect.dataclasses.replace(source, state="running") for source in sources]
    for found, hidden in ((running, False), (sources, True)):
        page.write(folder, "x", found)
        browser.open((folder / "index.html").as_uri())
        assert browser.run("document.getElementById('follow-label').hidden") is hidden
