"""The docs site in a real browser: every page is opened, with no network but the site itself.

`NC_DOCS` names a site that is already built; without it, `tools/docs.py` builds one.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from filelock import FileLock
from nbdev.config import get_config, nbpath2html

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
CONFIG = get_config(ROOT)
HOSTS = {"arxiv.org", "doi.org", "docs.fast.ai", "fastcore.fast.ai", "nbdev.fast.ai", "fastprogress.fast.ai",
         "pyg.org",
         "py-filelock.readthedocs.io",
         "huggingface.co",
         "distributed.dask.org"}
PREFIX = "/nc_nbdev/"  # GitHub Pages serves the site under the name of the project, not at the root
REPORT = "reports/report.html"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

# What a page looks like once its scripts have run. `prose` is the text outside code and rendered maths.
FACTS = r"""async () => {
  const all = (sel) => Array.from(document.querySelectorAll(sel));
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  const prose = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent.closest('pre, code, script, style, svg, .katex, .code-copy-button')) continue;
    prose.push(walker.currentNode.data);
  }
  const opaque = (img) => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
    const context = canvas.getContext('2d');
    context.drawImage(img, 0, 0, 1, 1, 0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data[3] > 0;
  };
  return {
    title: document.title,
    links: all('a[href]').map((a) => a.href),
    ids: all('[id]').map((e) => e.id),
    repeated: all('main [id]').map((e) => e.id).filter((id, i, ids) => ids.indexOf(id) !== i),
    images: all('img').map((i) => ({src: i.src.slice(0, 80), alt: i.alt, loaded: i.complete && i.naturalWidth > 0})),
    opaque: all('img[src^="data:image/png"]').filter(opaque).map((i) => i.alt),
    math: {asked: all('.math').length, drawn: all('.math .katex').length,
           errors: all('.katex-error').map((e) => e.title)},
    prose: prose.join('\n'),
    toc: all('#TOC a.nav-link').length,
    headings: all('main h2').length,
    unnamed: all('a[href]').filter((a) => !a.hidden && !a.textContent.trim() && !a.title && !a.ariaLabel
      && !a.querySelector('img[alt]')).map((a) => a.outerHTML.slice(0, 120)),
  };
}"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
MARKUP = [r"\$\$", r"\\\(|\\\[|\\begin\{|\\frac|\\math", r"(?<!\w)\$\\?\w[^$\n]*\$", r":::", r"\]\(", r"\*\*\w",
          r"\{#", r"#\|", "```"]


def _serve(folder):
    "Serve `folder` under PREFIX, on a free port."

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            inside = path.startswith(PREFIX)
            return super().translate_path("/" + path.removeprefix(PREFIX) if inside else "/no/such/file")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _pages(docs):
    "The paths of the site's pages; the report of `make reproduce` is a file of its own make."
    return {p.relative_to(docs).as_posix() for p in docs.rglob("*.html")} - {REPORT}


@pytest.fixture(scope="session")
def docs():
    "The built site's folder."
    built = os.environ.get("NC_DOCS")
    if not built:
        subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, check=True)
    folder = Path(built or ROOT / "_docs").resolve()
    assert (folder / "index.html").exists(), f"no site in {folder}"
    return folder


@pytest.fixture(scope="session")
def url(docs):
    "The site's address."
    server = _serve(docs)
    yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    "Chromium; a machine without it skips, but CI fails."
    if not CHROMIUM:
        message = "no chromium: install it, or name it in CHROMIUM"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def _open(browser, url, problems, **options):
    "A page that may ask the site alone; what goes wrong is noted in `problems`."
    context = browser.new_context(viewport=DESKTOP, **options)

    def route(request):
        if request.request.url.startswith((url, "data:", "blob:")):
            return request.continue_()
        problems.append(f"asks the network: {request.request.url}")
        request.abort()

    context.route("**/*", route)
    page = context.new_page()
    slow = re.compile("willReadFrequently|GPU stall due to ReadPixels")  # advice on speed, where 3-D has no GPU

    def console(message):
        if message.type in ("error", "warning") and not slow.search(message.text):
            problems.append(f"console: {message.text}")

    page.on("console", console)
    page.on("pageerror", lambda e: problems.append(f"script: {e}"))
    page.on("requestfailed", lambda r: problems.append(f"failed: {r.url}"))
    page.on("response", lambda r: problems.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return page


@pytest.fixture
def page(browser, url):
    "The index page, in a context of its own."
    problems = []
    page = _open(browser, url, problems, color_scheme="light")
    page.goto(url)
    yield page
    page.context.close()
    assert not problems


@pytest.fixture(scope="session")
def crawl(browser, url, docs, tmp_path_factory, worker_id):
    "The facts of every page that links lead to, by its path in the site. Of two workers one looks, the other reads."
    if worker_id == "master": return _crawl(browser, url, docs)
    file = tmp_path_factory.getbasetemp().parent / "crawl.json"
    with FileLock(f"{file}.lock"):
        if not file.exists(): file.write_text(json.dumps([url, _crawl(browser, url, docs)]))
    theirs, found = json.loads(file.read_text())
    return json.loads(json.dumps(found).replace(theirs, url))                 # each worker serves at a port of its own


def _crawl(browser, url, docs):
    problems, seen, todo = [], {}, ["index.html"]
    page = _open(browser, url, problems)
    while todo:
        path = todo.pop()
        if path in seen or path == REPORT or not (docs / path).exists():  # a dead link: test_links_and_anchors says so
            continue
        problems.clear()
        page.set_viewport_size(DESKTOP)
        page.goto(url + path)
        facts = page.evaluate(FACTS)
        facts["wide"] = page.evaluate(SIDEWAYS)
        page.set_viewport_size(PHONE)
        facts["phone"] = page.evaluate(SIDEWAYS)
        facts["problems"] = list(problems)
        seen[path] = facts
        own = [link.removeprefix(url).partition("#")[0] for link in facts["links"] if link.startswith(url)]
        todo += [p or "index.html" for p in own if p == "" or p.endswith(".html")]
    page.context.close()
    return seen


def _failures(crawl, key):
    return {path: facts[key] for path, facts in crawl.items() if facts[key]}


def test_every_page_is_reached(crawl, docs):
    assert set(crawl) == _pages(docs)


def test_nothing_goes_wrong(crawl):
    assert not _failures(crawl, "problems")


def test_links_and_anchors(crawl, docs, url):
    dead = []
    for path, facts in crawl.items():
        for link in facts["links"]:
            target, _, anchor = link.removeprefix(url).partition("#")
            target = target or "index.html"
            if not link.startswith(url):
                if not link.startswith(("https://", "mailto:")):
                    dead.append(f"{path}: {link}")
            elif not (docs / target).exists():
                dead.append(f"{path}: no page {target}")
            elif anchor and target.endswith(".html") and anchor not in crawl[target]["ids"]:
                dead.append(f"{path}: no anchor {target}#{anchor}")
    assert not dead


def test_links_lead_to_known_hosts(crawl, url):
    "No link leads to a host that nobody has looked at; the repository's own address stands in pyproject.toml alone."
    own = ({"github.com", "colab.research.google.com", "mybinder.org"} if CONFIG.git_url else set()) | HOSTS
    assert not [f"{path}: {link}" for path, facts in crawl.items() for link in facts["links"]
                if not link.startswith((url, "mailto:")) and urlparse(link).hostname not in own]


def test_no_address_without_a_repository(docs):
    "As long as pyproject.toml names no repository, no page, copy or list names one."
    if CONFIG.git_url: return
    words = re.compile(r"nc-nbdev|github\.(com|io)/\S*nc_nbdev|mybinder\.org|colab\.research|git\+https|site\.invalid")
    kinds = (".html", ".md", ".txt", ".xml", ".json")
    texts = {p: p.read_text(encoding="utf-8") for p in docs.rglob("*") if p.suffix in kinds and "vendor" not in p.parts}
    assert not [f"{p.relative_to(docs)}: {m[0]}" for p, text in texts.items() if (m := words.search(text))]


def test_no_id_twice(crawl):
    assert not _failures(crawl, "repeated")


def test_maths_is_drawn(crawl):
    maths = {path: facts["math"] for path, facts in crawl.items()}
    assert not {p: m for p, m in maths.items() if m["errors"] or m["asked"] != m["drawn"]}
    assert sum(m["drawn"] for m in maths.values()) > 50


def test_no_markup_is_left(crawl):
    left = [f"{path}: {m[0]!r} in {facts['prose'][max(0, m.start() - 30):m.end() + 30]!r}"
            for path, facts in crawl.items() for m in re.finditer("|".join(MARKUP), facts["prose"])]
    assert not left


def test_openings_are_there(crawl):
    "The text under a notebook's title is on its page: nbdev alone drops it."
    nbs, words, lost = ROOT / "nbs", lambda text: re.findall(r"[A-Za-z]+", text), []
    for notebook in nbs.glob("**/[!_.]*.ipynb"):
        title = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
        opening = words(re.split(r"[\[`$*]", re.sub(r"\A# .*\s+(> .*\s*)*", "", title))[0])[:12]
        page = nbpath2html(notebook.relative_to(nbs)).as_posix()
        if page in crawl and " ".join(opening) not in " ".join(words(crawl[page]["prose"])):
            lost.append(page)
    assert not lost


def test_images(crawl):
    images = [(path, image) for path, facts in crawl.items() for image in facts["images"]]
    assert not [(path, i) for path, i in images if not i["alt"].strip() or not i["loaded"]]


def test_figures_suit_light_and_dark(crawl):
    "A figure with a background of its own would glare on one of the two."
    assert not _failures(crawl, "opaque")


def test_every_link_has_a_name(crawl):
    assert not _failures(crawl, "unnamed")


def test_no_sideways_scroll(crawl):
    assert not _failures(crawl, "wide")
    assert not _failures(crawl, "phone")


def test_table_of_contents(crawl):
    assert not [path for path, facts in crawl.items() if facts["headings"] > 1 and not facts["toc"]]


def test_reading_order(page):
    "The sidebar shows the rooms in the order of the architecture."
    rooms = ["geometry", "lab", "vision", "paper", "theory", "neighbours"]
    links = page.eval_on_selector_all("#quarto-sidebar a[href]", "links => links.map(a => a.getAttribute('href'))")
    shown = list(dict.fromkeys(Path(link).parts[0] for link in links if "/" in link.removeprefix("./")))
    assert shown == [room for room in rooms if room in shown]
    assert Path(links[-1]).name == "references.html"


def test_search(page):
    page.get_by_role("searchbox").first.fill("simplex")
    result = page.locator(".search-result").first
    result.wait_for()
    contrast = result.evaluate("""e => {
      const lum = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return .299 * r + .587 * g + .114 * b; };
      return Math.abs(lum(getComputedStyle(e).color) - lum(getComputedStyle(e.parentElement).backgroundColor)); }""")
    assert contrast > 100
    target = result.get_attribute("href")
    result.click()
    page.wait_for_url("**/" + target.removeprefix("./"))
    assert "simplex" in page.locator("main").inner_text().lower()


def _brightness(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_dark_mode(page, url):
    assert _brightness(page) > 200
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert _brightness(page) < 80
    page.goto(url + "glossary.html")  # the choice is kept
    assert _brightness(page) < 80


def test_phone_navigation(page):
    page.set_viewport_size(PHONE)
    page.get_by_label("Toggle sidebar navigation").click()
    page.locator("#quarto-sidebar").get_by_role("link", name="Glossary of measures").click()
    assert page.url.endswith("/glossary.html")


def test_keyboard(page):
    "Tab first offers to skip the navigation, then reaches search, the theme toggle and every page of the sidebar."
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    wanted = set(page.eval_on_selector_all("#quarto-sidebar a[href]", "links => links.map(a => a.href)"))
    reached, visible = {}, True
    for _ in range(20 + 2 * len(wanted)):
        page.keyboard.press("Tab")
        name, focus = page.evaluate("""() => {
          const e = document.activeElement, style = getComputedStyle(e);
          const seen = style.outlineStyle !== 'none' || style.boxShadow !== 'none';
          const toggle = e.matches('.quarto-color-scheme-toggle') ? 'toggle' : e.href;
          const name = e.matches('[type=search]') ? 'search' : toggle;
          return [name, seen]; }""")
        reached[name], visible = True, visible and (focus or name is None)
    assert wanted | {"search", "toggle"} <= set(reached)
    assert visible


def test_skip_link_reaches_the_text(page):
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.url.endswith("#quarto-document-content")


def test_llms_txt(docs):
    "llms.txt lists the modules with their docstrings and a Markdown copy of every page."
    text = (docs / "llms.txt").read_text(encoding="utf-8")
    host = f"{CONFIG.doc_url.rstrip('/')}/".lstrip("/")
    links = [link.removeprefix(host) for link in re.findall(r"\]\(([^)\s]+)\)", text.partition("## Pages")[2])]
    assert {p + ".md" for p in _pages(docs)} == set(links)
    assert all((docs / link).exists() for link in links)
    modules = text.partition("## Modules")[2].partition("## Pages")[0]
    assert {"geometry.etf", "lab.taps", "rooms"} <= set(re.findall(r"nc_nbdev\.([\w.]+)[`\]]", modules))


def test_search_index_has_every_page(docs):
    entries = json.loads((docs / "search.json").read_text(encoding="utf-8"))
    assert {e["href"].partition("#")[0] for e in entries} == _pages(docs)


SPREAD = """() => {
  const [train, test] = document.querySelector('.plotly-figure')._fullData;   // as decoded
  const axes = (t) => ['x', 'y', 'z'].map((a) => Array.from(t[a]));
  const spread = (t) => {   // mean squared distance to the mean of the points of the same colour
    const points = axes(t), groups = {};
    t.marker.color.forEach((c, i) => (groups[c] ??= []).push(points.map((p) => p[i])));
    let total = 0, n = 0;
    for (const group of Object.values(groups)) {
      const mean = [0, 1, 2].map((k) => group.reduce((s, p) => s + p[k], 0) / group.length);
      for (const p of group) { total += p.reduce((s, v, k) => s + (v - mean[k]) ** 2, 0); n += 1; }
    }
    return total / n;
  };
  return [spread(train), spread(test)]; }"""


RELEASE = """() => {   // a tap that ends before its frame is drawn
  const figure = document.querySelector('.plotly-figure');
  const release = () => figure.dispatchEvent(new MouseEvent('mouseup'));
  figure.once('plotly_animatingframe', () => Promise.resolve().then(release)); }"""


def test_tetrahedron_slider_moves_the_points(page, url):
    "Train points run into the corners, test points stay behind; the drawing follows the slider."
    page.goto(url + "paper/tetrahedron.html")
    figure = page.locator(".plotly-figure")
    figure.scroll_into_view_if_needed()
    figure.locator(".slider-rail-touch-rect").wait_for(state="attached")
    page.wait_for_function("document.querySelector('.plotly-figure')._transitionData._frames.length > 5")
    scene, rail = figure.locator("canvas").first, figure.locator(".slider-rail-touch-rect")
    train_last, test_last = page.evaluate(SPREAD)
    assert test_last > 3 * train_last
    picture = scene.screenshot()
    box = rail.bounding_box()
    page.evaluate(RELEASE)
    page.mouse.move(box["x"] + 3, box["y"] + box["height"] / 2)
    page.mouse.down()
    label = "document.querySelector('.plotly-figure .slider-label')?.textContent"
    page.wait_for_function(f"{label} === 'epoch 0'")
    page.mouse.up()
    page.wait_for_function(f"({SPREAD})()[0] > {10 * train_last}")
    train_first, test_first = page.evaluate(SPREAD)
    assert 0.7 < test_first / train_first < 1.4
    page.wait_for_timeout(300)
    assert scene.screenshot() != picture
    figure.get_by_text("Play").click()
    page.wait_for_function(f"{label} === 'epoch 150'", timeout=90_000)      # drawn by the processor, beside other tests
    page.wait_for_function(f"({SPREAD})()[0] < {1.01 * train_last}")


def test_every_page_can_be_run_elsewhere(crawl):
    "Each page links to its own notebook at Colab and at Binder, once the repository has an address."
    repo, found = CONFIG.git_url.removeprefix("https://github.com/") + "/", []
    for path, facts in crawl.items():
        notebook = f"/github/{repo}blob/{CONFIG.branch}/"
        colab = [link.partition(notebook)[2] for link in facts["links"] if "//colab." in link]
        binder = [unquote(link.partition("?labpath=")[2]) for link in facts["links"] if "//mybinder." in link]
        assert colab == binder and len(colab) == bool(CONFIG.git_url), path
        for notebook in colab:
            assert (ROOT / notebook).is_file(), f"{path}: no {notebook}"
            assert nbpath2html(Path(notebook).relative_to("nbs")).as_posix() == path
        found += colab
    assert len(set(found)) == len(found)


def test_interactive_page_is_small(docs):
    "The page and the script that draws it, without a network: under 2 MB together with the static picture."
    html = docs / "paper/tetrahedron.html"
    text = html.read_text(encoding="utf-8")
    scripts = {html.parent / s for s in re.findall(r'<script src="([^"]*plotly[^"]*)"', text)}
    assert len(scripts) == 1
    figure = re.search(r'<script>Plotly.newPlot.*?</script>', text, flags=re.S)[0]
    assert len(figure) + sum(s.stat().st_size for s in scripts) < 2_000_000


def test_markdown_copies_hold_no_scripts(docs):
    assert not [p.name for p in docs.rglob("*.html.md") if "Plotly.newPlot" in p.read_text(encoding="utf-8")]


def test_report_is_linked(crawl, docs, url):
    "Where `make reproduce` has written its report, the page `reproduce` leads to it."
    linked = [link.removeprefix(url) for link in crawl["reproduce.html"]["links"] if link.startswith(url)]
    assert (REPORT in linked) == (docs / REPORT).exists()
    assert (docs / REPORT).exists() >= (ROOT / REPORT).exists()
