"The page of `cekd-serve` as a guest uses it, on a phone and on a desk: pictures are dropped, a broken one among them, and each gets its answer."
import signal,subprocess,sys
import pytest

sizes = dict(phone=dict(width=375, height=812), desk=dict(width=1280, height=900))
wide_js = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"

MAKE = """import sys
from pathlib import Path
from PIL import Image
from cekd_fastai.all import *
from cekd_fastai.explain import add_examples
tmp = Path(sys.argv[1])
birds = make_birds(tmp/'birds', n_species=4, n_images=8, n_train=6, size=160, progress=False)
dls = fine_grained_dls(birds, size=128, bs=8, num_workers=0)
learn = branch_learner(dls, 'test_resnet', pretrained=False)
deploy(learn, tmp/'plain.pt')
add_examples(deploy(learn, tmp/'birds.pt'), dls, n=3)
for i,o in enumerate(dls.valid.items[:3]): Image.open(o).convert('RGB').save(tmp/f'photo{i}.jpg')"""

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A network with examples, and three pictures, one that is broken and one with a hostile name."
    tmp = tmp_path_factory.mktemp('serve')
    subprocess.run([sys.executable, '-W', 'ignore', '-c', MAKE, str(tmp)], check=True, stdout=subprocess.DEVNULL)
    (tmp/'broken.jpg').write_bytes((tmp/'photo0.jpg').read_bytes()[:300])
    (tmp/"<img src=x onerror='document.title=1'>.jpg").write_bytes((tmp/'photo2.jpg').read_bytes())
    return tmp

@pytest.fixture(scope='module')
def address(photos):
    "Address of a server in a process of its own, bound as the command binds it."
    script = photos/'serve_script.py' # as the console script starts it
    script.write_text("from cekd_fastai.commands import cekd_serve\nif __name__=='__main__': cekd_serve()\n")
    p = subprocess.Popen([sys.executable, '-W', 'ignore', script, photos/'birds.pt', '--port', '0'], stdout=subprocess.PIPE, text=True)
    try: yield p.stdout.readline().split()[0]
    finally:
        p.send_signal(signal.SIGINT)
        assert p.wait(20)==0

def opened(browser, url, **kw):
    "A page and the list of its faults."
    page,faults = browser.new_page(**kw),[]
    page.on('console', lambda m: m.type in ('error','warning') and faults.append(m.text))
    page.on('pageerror', lambda e: faults.append(str(e)))
    page.on('request', lambda r: '127.0.0.1' not in r.url and not r.url.startswith('data:') and faults.append(f'leaves the page: {r.url}'))
    page.goto(url)
    page.wait_for_function("() => document.getElementById('about').textContent")
    return page,faults

@pytest.mark.parametrize('size,scheme', [('phone','light'), ('phone','dark'), ('desk','light'), ('desk','dark')])
def test_page(address, photos, browser, shots, size, scheme):
    page,faults = opened(browser, address, viewport=sizes[size], color_scheme=scheme)
    page.locator('#files').set_input_files([photos/'photo0.jpg', photos/'broken.jpg', photos/'photo1.jpg', next(photos.glob('<img*'))])
    page.wait_for_function("() => document.getElementById('status').textContent.includes('done')", timeout=60_000)
    items = page.locator('#results > li')
    assert items.count()==4 and page.locator('#results > li.bad').count()==1
    assert 'This is not a picture, or it is broken' in items.nth(1).inner_text() or 'cannot be decoded' in items.nth(1).inner_text()
    assert items.nth(3).locator('h2').inner_text().startswith('<img src=x') and page.title()=='What is in the picture?'
    first = items.nth(0)
    assert first.locator('.answer').count()==3 and first.locator('figure').count()==2+4
    widths = [o.bounding_box()['width'] for o in first.locator('.answer i').all()]
    assert widths==sorted(widths, reverse=True) and widths[0]>20
    assert page.evaluate("() => [...document.images].every(o => o.naturalWidth && o.alt)") and page.evaluate(wide_js)<=0
    bright = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(bright)/3<60)==(scheme=='dark') and faults==[]
    page.screenshot(path=shots/f'serve_{size}_{scheme}.png', full_page=True)
    page.close()

def test_dropped(address, photos, browser):
    "Pictures dropped from another window, with one answer each."
    page,faults = opened(browser, address, viewport=sizes['desk'])
    page.locator('#top').fill('1')
    page.evaluate("""async url => {
      const im = await (await fetch('page.css')).blob(), data = new DataTransfer()
      data.items.add(new File([im], 'style.css')); data.items.add(new File([im], 'again.css'))
      document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})) }""", address)
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('2 pictures done')", timeout=60_000)
    assert page.locator('#results > li.bad').count()==2 and faults==[]
    page.evaluate("""async () => {
      const im = await (await fetch('page.css')).blob()
      for (const names of [['a1','a2','a3'], ['b1','b2']]) {
        const data = new DataTransfer()
        for (const o of names) data.items.add(new File([im], o))
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})) }}""")
    page.wait_for_function("() => document.getElementById('status').textContent.startsWith('2 pictures done')", timeout=60_000)
    assert page.locator('#results h2').all_inner_texts()==['b1','b2'] # the later drop takes the place of the earlier
    page.close()
