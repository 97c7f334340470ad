"""The report of runs: what it says, that names stay text, and what it does in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import table_records

from alps_exp.patterns import written
from alps_exp.report import gather, make
from alps_exp.tables import archive

charts = pytest.importorskip("alps_exp.report.charts", reason="needs the extra `report`")

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Counts tags, and keeps the text outside scripts and style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


def records(**more) -> list[dict]:
    """Two methods at three sparsities, of two seeds each, and the dense model."""
    found = [table_records.record("dense", perplexity=15.0, run="dense", **more)]
    for method, factor in (("alps", 1.0), ("wanda", 4.0)):
        for sparsity, value in (("0.5", 20.0), ("0.7", 40.0), ("2:4", 30.0)):
            for seed in (0, 1):
                run = f"{method}-{sparsity}-{seed}"
                figures = {"perplexity": factor * value + seed, "loss": 0.01 * factor, "run": run}
                found.append(table_records.record(method, sparsity, seed, **figures, **more))
    return found


def written_to(folder: Path, found: list[dict]) -> Path:
    for number, record in enumerate(found):
        (folder / f"run{number}").mkdir(parents=True)
        (folder / f"run{number}" / "record.json").write_text(json.dumps(record))
    return folder


def sweep(found: list[dict], **more) -> gather.Sweep:
    return gather.gather([archive.RunSet("mine", found, [], "here", **more)])[0]


@pytest.fixture
def without_libraries(monkeypatch):
    """Their megabytes say nothing about the page."""
    monkeypatch.setattr(make, "_vega", lambda: "")
    monkeypatch.setattr(make, "_datatables", lambda: {"script": "", "style": ""})


def test_figures_of_a_run():
    found = sweep([table_records.record("alps", "0.7", run="one"), table_records.record("dense", run="two")])
    dense, one = found.runs
    assert (dense.level, dense.losses, dense.megabytes) == (0.0, [], None)
    assert one.losses == [(0, 0.05), (1, pytest.approx(0.15))]
    # 64 weights of 4 bytes, half of them zeros, and a bit for each.
    assert one.megabytes == pytest.approx((32 * 4 + 8) / 1e6)
    assert one.seconds == 4.0
    assert {**gather.facts(one)}["wikitext2 perplexity (2048)"] == "20.00"
    assert "name: alps" in gather.behind(one)["Configuration"]


def test_paths_of_this_machine_stay_here():
    record = table_records.record("alps", run="one")
    record["config"] = record["config"] | {"data": {"path": "/home/me/secret/text.txt"}}
    (run,) = sweep([record]).runs
    assert "path: text.txt" in gather.behind(run)["Configuration"] and "secret" not in str(run.record)


def test_what_a_sweep_varies_names_its_series():
    found = [table_records.record("alps", run=str(n)) for n in (8, 16)]
    for number, record in zip((8, 16), found, strict=True):
        record["config"] = record["config"] | {"nsamples": number}
    found[1]["config"] = found[1]["config"] | {"eval": {"name": "speed"}}  # says nothing about what was done
    assert [run.series for run in sweep(found).runs] == ["alps nsamples=8", "alps nsamples=16"]


def test_sets_without_a_table_of_means_say_why():
    twice = [table_records.record("alps", run="one"), table_records.record("alps", run="two")]
    found = sweep(twice, unreadable={"three": "/home/me/three is not a readable record"})
    assert found.table is None and len(found.runs) == 2
    assert found.notes[0].startswith("three") and "same configuration and seed" in found.notes[1]


@pytest.mark.slow
def test_one_run_of_each_series_is_drawn_along_the_depth():
    spec, ticked = charts.charts([sweep(records())])
    drawn = {row["id"]: row for row in spec["datasets"]["depth"]}
    assert {drawn[run]["series"] for run in ticked} == {"alps", "wanda"}
    assert len({drawn[run]["sparsity"] for run in ticked}) == 1
    rows = spec["datasets"]["runs"]
    assert {row["panel"] for row in rows} == {"mine: wikitext2 perplexity (2048)", "mine: relative loss"}
    assert {row["pattern"] for row in rows if not row["dense"]} == {"unstructured", "2:4"}


def test_what_is_not_finite_is_listed_and_not_drawn(without_libraries):
    found = [sweep([table_records.record("alps", perplexity=float("inf"), loss=0.0, run="one")])]
    assert charts.charts(found) == ({}, [])
    text = Tags(make.page(found)).text
    assert "inf" in text and "No complete run" in text


@pytest.mark.slow
def test_names_stay_text(without_libraries):
    plain = Tags(make.page([sweep(records())]))
    more = {"warnings": [EVIL], "sample": {"prompt": EVIL}}
    found = [record | {"run": EVIL, "model": EVIL, "method": EVIL} for record in records(**more)[1:3]]
    found[0]["config"] = found[0]["config"] | {"data": {"name": EVIL, EVIL: "1"}}
    found[0]["evaluations"][0]["dataset"] = EVIL
    text = make.page([sweep(found, unreadable={EVIL: EVIL})])
    evil = Tags(text)
    assert evil.tags.count("script") == plain.tags.count("script") == 3
    assert EVIL not in text and EVIL in evil.text
    assert EVIL in json.dumps(json.loads(re.search(r'id="spec">(.*?)</script>', text)[1]))


@pytest.mark.slow
def test_the_same_records_give_the_same_page(without_libraries):
    assert make.page([sweep(records())]) == make.page([sweep(records()[::-1])])


def test_refusals(tmp_path, capsys, monkeypatch):
    target = tmp_path / "report.html"
    assert make.main([str(tmp_path), "--to", str(target)]) == 2
    assert "no records below" in capsys.readouterr().err
    runs = written_to(tmp_path / "runs", records())
    monkeypatch.setattr(make, "find_spec", lambda name: None if name == "altair" else name)
    assert make.main([str(runs), "--to", str(target)]) == 2
    assert capsys.readouterr().err.strip() == ("alps_exp: the report needs altair: pip install 'alps-exp[report]'")
    assert not target.exists()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.heavy
def test_in_a_browser(tmp_path, browser, capsys):
    """Without network: no errors, sorted and filtered tables, a tooltip, a run's page, the colours of the system."""
    found = records()
    found[1] = found[1] | {"model": EVIL}
    target = tmp_path / "report.html"
    assert make.main([str(written_to(tmp_path / "runs", found)), "--to", str(target)]) == 0
    assert "13 runs" in capsys.readouterr().out
    page = browser.new_page(viewport={"width": 1300, "height": 900}, color_scheme="dark")
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.goto(target.as_uri())
    page.wait_for_selector("body[data-ready]")
    assert told == [] and not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]

    rows = page.locator("#runs tbody tr")
    names = page.locator("#runs tbody tr .open")
    assert rows.count() == 13
    page.locator("#runs thead th", has_text="wikitext2").locator("button").first.click()
    page.wait_for_selector("#runs thead th[aria-sort]:has-text('wikitext2')")
    values = [float(text) for text in page.locator("#runs tbody tr td:nth-child(11)").all_inner_texts()]
    assert values == sorted(values)
    page.locator("#runs thead th", has_text="sparsity").locator("button").first.click()
    page.wait_for_selector("#runs thead th[aria-sort]:has-text('sparsity')")
    order = page.locator("#runs tbody tr td:nth-child(6)").all_inner_texts()
    assert order == sorted(order, key=written.order) and order[0] == "0" and order[-1] == "2:4"
    page.locator("#runs_wrapper input[type=search]").fill("wanda 2:4")
    assert sorted(names.all_inner_texts()) == ["run11", "run12"]

    assert page.locator("[popover]:popover-open").count() == 0
    rows.first.click(position={"x": 600, "y": 8})
    shown = page.locator("[popover]:popover-open")
    assert shown.count() == 1 and "nsamples: 128" in shown.inner_text() and "float32" in shown.inner_text()
    page.keyboard.press("Escape")
    page.locator("#runs_wrapper input[type=search]").fill("")

    before = page.locator("#chart .mark-line path").count()
    rows.locator("input:not(:checked)").first.check()
    page.wait_for_timeout(200)
    assert page.locator("#chart .mark-line path").count() == before + 1
    page.locator("#chart .mark-symbol path[aria-label*='seconds']").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "perplexity" not in page.locator("#vg-tooltip-element").inner_text()
    assert "seed" in page.locator("#vg-tooltip-element").inner_text()

    def colour() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = colour()
    page.locator("#light").check()
    assert colour() != dark
    page.emulate_media(media="print")
    assert page.locator("#dark").is_hidden() and told == []
