"The site in a browser, on a phone and on a desk: searched, followed, and every page without a fault."
import re,time
from urllib.parse import urljoin,urldefrag
import pytest

sizes = dict(phone=dict(width=390, height=844), desktop=dict(width=1280, height=900))

def names(dest): return sorted(p.relative_to(dest).as_posix() for p in dest.rglob('*.html'))

def watched(browser, size, **kw):
    "A page and the list that its faults go to: errors of scripts and in the console, requests that fail or leave the site."
    page,faults = browser.new_page(viewport=sizes[size], **kw),[]
    page.on('console', lambda m: m.type in ('error', 'warning') and faults.append(f'console: {m.text}'))
    page.on('pageerror', lambda e: faults.append(f'script: {e}'))
    # what a reader leaves before it is there has not failed
    page.on('requestfailed', lambda r: r.failure!='net::ERR_ABORTED' and faults.append(f'failed: {r.url}'))
    page.on('response', lambda r: r.status>=400 and faults.append(f'{r.status}: {r.url}'))
    page.on('request', lambda r: '127.0.0.1' not in r.url and not r.url.startswith('data:') and faults.append(f'leaves the site: {r.url}'))
    return page,faults

broken_js = "() => [...document.images].filter(o => o.getClientRects().length && !o.naturalWidth).map(o => o.src)"
unnamed_js = "() => [...document.images].filter(o => !o.alt).map(o => o.src)"
wide_js = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
widest_js = """() => [...document.querySelectorAll('article *')].filter(o => o.getBoundingClientRect().right > innerWidth+1 &&
  !o.parentElement.closest('.output,pre,.table-wrapper,.math,.highlight')).slice(0, 3).map(o => o.outerHTML.slice(0, 120))"""

scrolled_js = """() => [...document.querySelectorAll('.table-wrapper, .output')].filter(o => o.querySelector('table') && o.scrollWidth > o.clientWidth+1)
  .map(o => o.innerText.slice(0, 60))"""

@pytest.mark.parametrize('size', sizes)
def test_pages(site, browser, shots, size):
    "No page has a console error, a failed request, a picture that is broken or unnamed; it does not scroll sideways, nor does a table on a phone."
    url,dest = site
    page,faults = watched(browser, size)
    for name in names(dest):
        page.goto(f'{url}/{name}')
        page.evaluate("() => document.querySelectorAll('img[loading=lazy]').forEach(o => o.loading = 'eager')")
        page.wait_for_load_state('networkidle')
        faults += [f'broken: {o}' for o in page.evaluate(broken_js)] + [f'without alt: {o}' for o in page.evaluate(unnamed_js)]
        if wide := page.evaluate(wide_js): faults.append(f'{wide} px too wide: {page.evaluate(widest_js)}')
        if size=='phone': faults += [f'table too wide: {o!r}' for o in page.evaluate(scrolled_js)]
        if name in ('index.html', 'mix.callback.html', 'course/look_alikes.html'): page.screenshot(path=shots/f'site_{size}_{name.replace("/", "_")[:-5]}.png')
        assert faults==[], name
    page.close()

def test_links(site, browser):
    "Every link within the site is answered, and its anchor is there."
    url,dest = site
    page,_ = watched(browser, 'desktop')
    ids,wanted = {},set()
    for name in names(dest):
        page.goto(f'{url}/{name}')
        ids[f'{url}/{name}'] = set(page.evaluate("() => [...document.querySelectorAll('[id]')].map(o => o.id)"))
        wanted |= {(name, o) for o in page.evaluate("() => [...document.querySelectorAll('a[href]')].map(o => o.getAttribute('href'))")}
    page.close()
    seen = {(name, *urldefrag(urljoin(f'{url}/{name}', o))) for name,o in wanted}
    inner = {o for o in seen if o[1].startswith(url)}
    assert len(inner)>500
    assert [o for o in inner if o[1] not in ids or (o[2] and o[2] not in ids[o[1]])]==[]

def searched(page, words, size):
    "Addresses of what the site's own search finds, best first, when a reader types the words into its box."
    if size=='phone': page.locator('label[for="__navigation"]:visible').first.click()
    box = page.locator('input.sidebar-search')
    box.fill(words)
    box.press('Enter')
    page.locator('#search-results li a').first.wait_for(timeout=30_000)
    page.wait_for_function("() => /finished|found/i.test(document.querySelector('#search-results').innerText)", timeout=30_000)
    return [o.get_attribute('href') for o in page.locator('#search-results li > a').all()]

# What a reader types, and a page that answers it with words that are on it
questions = [('my own folder', 'howto/my_folder', 'one folder for each class'), ('labels CSV', 'howto/csv_labels', 'label_col'),
    ('which method', 'howto/which_method', 'The short answer'), ('imbalance', 'howto/few_rare_wrong', 'balanced=True'),
    ('HEIC', 'howto/my_folder', 'pillow-heif'), ('early stopping', 'howto/few_rare_wrong', 'EarlyStoppingCallback'),
    ('mixed precision', 'howto/speed_memory', 'to_fp16'), ('reproduce paper', 'howto/reproduce_paper', '--recipe'),
    ('out of memory', 'howto/speed_memory', 'GradCheckpoint()')]
words = [('class weights', 'howto/few_rare_wrong', 'weight='), ('focal loss', 'howto/few_rare_wrong', 'FocalLossFlat'),
    ('ONNX', 'howto/onnx|onnx_file', 'onnxruntime'), ('CSV', 'howto/csv_labels', 'label_col'), ('resume', 'howto/resume|checkpoint', 'checkpoint'),
    ('ViT', 'howto/backbones|howto/troubleshooting', 'ViT'), ('gradio', 'howto/web_page|howto/troubleshooting', 'gradio'),
    ('multi-GPU', 'howto/several_gpus|howto/speed_memory', 'torchrun')]

@pytest.mark.parametrize('size', sizes)
def test_questions(site, browser, shots, size):
    "Nine everyday questions and the words that people search for: a page among the first three results answers each; the seconds go into a file."
    url,_ = site
    page,faults = watched(browser, size)
    missed,log = [],shots/f'site_{size}_questions.txt'
    log.write_text('')
    for asked,name,answer in questions+words:
        start = time.perf_counter()
        page.goto(f'{url}/index.html')
        hits = searched(page, asked, size)[:3]
        found = [o for o in hits if re.search(name, o)]
        if not found:
            missed.append(f'{asked}: {hits}')
            continue
        page.screenshot(path=shots/f'site_{size}_search.png')
        page.locator(f'#search-results li > a[href="{found[0]}"]').first.click()
        page.locator('article h1').wait_for()
        with log.open('a') as f: f.write(f'{asked}: {found[0]}, result {1+hits.index(found[0])}, {time.perf_counter()-start:.1f} s\n')
        if answer.lower() not in page.locator('article').inner_text().lower(): missed.append(f'{asked}: {found[0]} lacks {answer}')
    page.close()
    assert missed==[] and faults==[]

def test_next(site, browser):
    "A link at the end of each page leads to the next one, from the first page to the last."
    url,dest = site
    page,_ = watched(browser, 'desktop')
    seen = ['index.html']
    page.goto(f'{url}/index.html')
    while page.locator('a.next-page').count():
        page.goto(urljoin(page.url, page.locator('a.next-page').get_attribute('href')))
        seen.append(page.url[len(url)+1:])
    page.close()
    assert len(set(seen))==len(seen) and set(names(dest))-set(seen)=={'genindex.html','search.html'}

def test_lesson_to_reference(site, browser):
    "A name in a lesson leads to its definition in the reference."
    url,dest = site
    if not (dest/'course'/'look_alikes.html').exists(): pytest.skip('no lesson yet')
    page,faults = watched(browser, 'desktop')
    page.goto(f'{url}/course/look_alikes.html')
    link = page.locator('article a[href^="../"][href*="#"]:has(code)').first
    name = link.inner_text()
    link.click()
    page.wait_for_load_state('networkidle')
    assert '/course/' not in page.url
    target = page.locator(f'[id="{urldefrag(page.url)[1]}"]')
    assert name.lower() in target.inner_text().lower() and faults==[]
    page.wait_for_function("o => Math.abs(o.getBoundingClientRect().top) < innerHeight/2", arg=target.element_handle(), timeout=10_000)
    page.close()

def test_dark(site, browser, shots):
    "Light and dark follow the reader's setting."
    def _bright(scheme):
        page,_ = watched(browser, 'desktop', color_scheme=scheme)
        page.goto(f'{site[0]}/mix.callback.html')
        rgb = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
        page.screenshot(path=shots/f'site_{scheme}_mix.png')
        page.close()
        return sum(rgb)/3
    assert _bright('dark')<60<200<_bright('light')
