"""Pages: what they show is what the report says; no text of a file becomes markup; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from merge_tool import OutputError, merge
from merge_tool.cli import merge_tool, slerp_merge
from merge_tool.output.report import load_tensors
from merge_tool.pages.columns import Columns, groups
from merge_tool.pages.merge_page import merge_data
from merge_tool.pages.page import page_text

HOSTILE = "model.layers.{}.</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>.weight"


def tool(*words: Any) -> Result:
    return CliRunner().invoke(merge_tool, [*map(str, words)])


def data_of(page: Path) -> dict[str, Any]:
    """The data in a page, as a browser reads them."""
    content: dict[str, Any] = json.loads(body_of_data(page.read_text()))
    return content


def body_of_data(text: str) -> str:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return str(found)


def test_a_page_has_the_figures_of_the_report(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    done = CliRunner().invoke(
        slerp_merge, [*map(str, pair), str(out), "--t", "0.4", "--t-for", "mlp=0,1", "--report-html", str(page)]
    )
    assert done.exit_code == 0, done.output
    data = data_of(page)
    columns, tensors = data["columns"], load_tensors(out / "merge_report.json")
    assert len(columns["module"]) == len(tensors)
    for i, tensor in enumerate(tensors):
        module, layer = data["modules"][columns["module"][i]], columns["layer"][i]
        assert (module if layer < 0 else module.replace("*", str(layer), 1)) == tensor["name"]
        assert columns["angle"][i] == pytest.approx(tensor["angle_degrees"], rel=1e-5)
        assert columns["t"][i] == pytest.approx(tensor["settings"]["t"], rel=1e-5)
        assert data["texts"][columns["shape"][i]] == " x ".join(map(str, tensor["shape"]))
    assert [group["pattern"] for group in data["groups"]] == ["self_attn", "mlp"]
    facts = dict(data["facts"])
    assert facts["t"] == "0.4"
    assert {"time", "peak memory"} <= {*facts}
    sums = (out / "SHA256SUMS").read_text()
    assert all(f"{digest}  {name}\n" in sums for name, _, digest in data["files"])

    again = tool("report", out)
    assert again.exit_code == 0, again.output
    later = data_of(tmp_path / "out.html")
    assert later["columns"] == columns
    assert "time" not in dict(later["facts"])  # a report does not know it


def test_a_comparison_and_a_sweep_have_pages(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = tool("diff", *pair, "--report-html", tmp_path / "d.html", "--json")
    found, data = json.loads(done.stdout), data_of(tmp_path / "d.html")
    assert data["columns"]["angle"] == pytest.approx([t["angle_degrees"] for t in found["tensors"]], rel=1e-5)
    (tmp_path / "judge.py").write_text(
        "import sys\nfor p in sys.argv[1:]: print('skill', p.rpartition('t-')[2]); print('loss', 1)\n"
    )
    judge = shlex.join([sys.executable, str(tmp_path / "judge.py")])
    done = tool("sweep", *pair, tmp_path / "sweep", "--t", "0,0.5,1", "--eval", judge)
    assert done.exit_code == 0, done.output
    data = data_of(tmp_path / "sweep/sweep.html")
    assert [(p["x"], p["scores"], p["pareto"]) for p in data["points"]] == [
        (0, [0, 1], False), (0.5, [0.5, 1], False), (1, [1, 1], True),
    ]  # fmt: skip


def test_texts_are_data_and_the_policy_names_the_script_and_the_style() -> None:
    text = page_text("</title><script>1</script>", {"kind": "merge", "name": HOSTILE, "odd": "\udcff\u2028"})
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<title>&lt;/title&gt;" in text
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("<script>", "script-src"), ("<style>", "style-src")):
        body = text.split(tag)[1].split(tag.replace("<", "</"))[0]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)", text.replace(body_of_data(text), ""))


def test_groups_are_the_patterns_that_match_first() -> None:
    modules = ["h.*.self_attn.q", "h.*.mlp.up", "h.*.norm", "mlp.out"]
    assert groups(modules) == [
        {"title": "attention", "pattern": "self_attn", "modules": [0]},
        {"title": "MLP", "pattern": "mlp", "modules": [1]},
    ]
    assert groups(["bert.*.attention.mlp.x"]) == [{"title": "attention", "pattern": "attention", "modules": [0]}]


@pytest.mark.parametrize("name", ["h.007.w", "a*b.3.w", "w", "h.3.experts.12.w", "*", "1"])
def test_every_name_comes_back(name: str) -> None:
    columns = Columns()
    columns.add(name, angle=float("inf"))
    (module,), (layer,) = columns.modules, columns.numbers["layer"]
    assert (module if layer < 0 else module.replace("*", str(layer), 1)) == name
    assert columns.numbers["angle"] == [None]


def test_what_cannot_have_a_page_is_refused_before_the_work(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = ["--report-html", str(tmp_path / "p.html")]
    for words, said in (
        ([*pair, tmp_path / "o", "--report-html", tmp_path / "p.png"], "a page's name must end in .html"),
        ([*pair, tmp_path / "o", "--report-html", tmp_path / "no/p.html"], "its folder is missing"),
        ([*pair, tmp_path / "o.safetensors", *page], "is one file, without a report"),
        ([*pair, tmp_path / "o", "--t", "0.1,0.2", *page], "2 outputs"),
        ([*pair, "hub:me/merged", *page], "hub:me/merged is not here"),
    ):
        done = tool("merge", *words)
        assert done.exit_code == 1
        assert said in done.output
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("o", "p"))] == []
    done = tool("report", pair[0])
    assert "holds no merge: it has no merge_report.json" in done.output
    out = tmp_path / "m"
    merge(*pair, out)
    text = (out / "merge_report.json").read_text()
    (out / "merge_report.json").write_text(text[: len(text) // 2])
    with pytest.raises(OutputError, match=r"merge_report.json: cannot be read"):
        merge_data(out)


# --------------------------------------------------------------------------------------- in a browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1600,1400",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("selenium", reason="needs selenium (pip) and Debian's chromium and chromium-driver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path) -> Any:
    browser.get_log("performance")
    browser.get(page.as_uri())
    return browser


def requests(browser: Any) -> set[str]:
    """The addresses that the browser asked for since the page was opened."""
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    sent = (e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent")
    return {url for url in sent if not url.startswith(("data:", "about:"))}


@pytest.mark.slow
def test_in_a_browser_points_are_dragged_into_a_command_that_plans(
    pair: tuple[Path, Path], tmp_path: Path, browser: Any
) -> None:
    """Hover, keys, drag: the command on the page is parsed and planned by slerp-merge, and has the t that were drawn;
    the recipe gives the same. Nothing but the page's own file is asked for, and no error is logged."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    out = tmp_path / "out"
    merge(*pair, out, 0.4)
    assert tool("report", out).exit_code == 0
    driver = opened(browser, tmp_path / "out.html")
    canvas = driver.find_element(By.TAG_NAME, "canvas")
    detail = driver.find_element(By.CLASS_NAME, "detail")
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    by_keys = detail.text
    assert by_keys.startswith("model.layers.0.")
    assert "degrees" in by_keys
    ActionChains(driver).move_to_element_with_offset(canvas, 0, 0).perform()
    ActionChains(driver).move_to_element_with_offset(canvas, canvas.size["width"] // 2 - 30, 30).perform()
    handles = driver.find_elements(By.CSS_SELECTOR, "circle.handle")
    ActionChains(driver).click_and_hold(handles[0]).move_by_offset(0, 60).release().perform()
    handles[-1].send_keys(Keys.END)
    command = driver.find_element(By.TAG_NAME, "pre").text
    words = shlex.split(command)
    drawn = dict(word.split("=") for word in words if "=" in word)
    first, last = drawn["self_attn"].split(",")[0], drawn["mlp"].split(",")[-1]
    assert float(first) < 0.4
    assert last == "1"
    names = {"base": str(pair[0]), "ft": str(pair[1]), "OUT": str(tmp_path / "again")}
    done = CliRunner().invoke(slerp_merge, [names.get(word, word) for word in words[1:]])
    assert done.exit_code == 0, done.output
    tensors = {t["name"]: t["settings"]["t"] for t in load_tensors(tmp_path / "again/merge_report.json")}
    assert tensors["model.layers.0.self_attn.q_proj.weight"] == float(first)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(driver.find_elements(By.TAG_NAME, "pre")[1].text)
    done = tool("run", recipe, tmp_path / "by recipe", "--models-dir", pair[0].parent)
    assert done.exit_code == 0, done.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "by recipe")]
    assert weights[0] == weights[1]
    assert requests(driver) == {(tmp_path / "out.html").as_uri()}
    assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_in_a_browser_hostile_names_are_texts(tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        weights = {HOSTILE.format(n): np.random.default_rng(k).normal(size=(4, 4)).astype("f4") for n in range(3)}
        save_file(weights, tmp_path / f"m{k}/model.safetensors")
    merge(tmp_path / "m0", tmp_path / "m1", tmp_path / "out")
    assert tool("report", tmp_path / "out").exit_code == 0
    driver = opened(browser, tmp_path / "out.html")
    assert driver.title == "out: merge report"
    assert driver.find_elements(By.TAG_NAME, "img") == []
    assert HOSTILE.format(0) in [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "td.name")]
    assert requests(driver) == {(tmp_path / "out.html").as_uri()}


@pytest.mark.slow
def test_in_a_browser_a_hundred_thousand_tensors_open(tmp_path: Path, browser: Any) -> None:
    """The page opens, with all of them; the printed seconds are for a reader, as the machine may be busy."""
    columns = Columns()
    rng = np.random.default_rng(0)
    for layer in range(60):
        for module in range(1667):
            name = f"model.layers.{layer}.mlp.experts.{module}.up_proj.weight"
            angle = float(rng.random())
            columns.add(name, angle=angle, change=angle, ratio=1.0, norm0=1.0, norm1=1.0, t=0.4, shape="7 x 7", note="")
    data = {"kind": "merge", "title": "large", "models": ["a", "b"], "facts": [], "pair": {"t": 0.4, "method": "slerp"}}
    page = tmp_path / "large.html"
    page.write_text(page_text("large", {**data, **columns.as_json()}))
    driver = opened(browser, page)
    seconds = driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    print(f"100,020 tensors, {page.stat().st_size / 1e6:.1f} MB: open in {seconds:.2f} s")
    assert "100,020 tensors" in driver.execute_script("return document.getElementById('page').textContent")


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_in_a_browser_nothing_is_wider_than_the_window(
    pair: tuple[Path, Path], tmp_path: Path, browser: Any, width: int
) -> None:
    merge(*pair, tmp_path / "out", 0.4)
    assert tool("report", tmp_path / "out").exit_code == 0
    browser.set_window_size(max(width, 500), 1000)  # Chromium's own least; narrower by emulation
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        driver = opened(browser, tmp_path / "out.html")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
