"A reader's way through a lesson: `make lab`, Run > Run All Cells, and no error in any output."
from pathlib import Path
import pytest

course = Path(__file__).resolve().parents[2]/'nbs'/'course'
lessons = '01_look_alikes','02_your_photographs','05_cekd_from_scratch','08_out_of_the_notebook'

cells_js = """() => {
  const cells = [...jupyterapp.shell.currentWidget.content.model.cells].filter(o => o.type=='code' && o.sharedModel.getSource().trim());
  return cells.map(c => ({n: c.executionCount, outputs: Array.from({length: c.outputs.length}, (_, i) => c.outputs.get(i).toJSON())}));
}"""

idle_js = "() => jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status=='idle'"

def opened(page, url):
    "Open `url` and wait for the notebook's kernel."
    page.goto(url)
    page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=120_000)
    page.wait_for_function(idle_js, timeout=120_000)

def run_all(page, timeout=600_000):
    "Run > Run All Cells, as a reader does it; returns every code cell once the last one has run."
    page.locator('.lm-MenuBar-itemLabel', has_text='Run').first.click()
    page.locator('.lm-Menu-itemLabel').get_by_text('Run All Cells', exact=True).click()
    page.wait_for_function(f'() => {{ const cs = ({cells_js})(); return cs.every(c => c.n) || cs.some(c => c.outputs.some(o => o.output_type=="error")) }}', timeout=timeout)
    page.wait_for_function(idle_js, timeout=60_000)
    return page.evaluate(cells_js)

def figures(page, shots, name):
    "Widths on the screen of the figures that are not folded, of each of which a screenshot is kept; cells are drawn when they come into view."
    widths = []
    for i in range(page.evaluate('() => jupyterapp.shell.currentWidget.content.widgets.length')):
        page.evaluate('i => jupyterapp.shell.currentWidget.content.scrollToItem(i, "start")', i)
        page.wait_for_timeout(50)
        cell = page.locator(f'.jp-Cell[data-windowed-list-index="{i}"] .jp-RenderedImage img:visible')
        for o in cell.all():
            o.screenshot(path=shots/f'lab_{name}_{len(widths)}.png')
            widths.append(o.bounding_box()['width'])
    return widths

def test_lab_opens_the_first_lesson(lab, browser):
    "The address that `make lab` prints leads to the first lesson, with this environment's kernel."
    page = browser.new_page(viewport=dict(width=1280, height=900))
    opened(page, lab(''))
    assert page.evaluate('() => jupyterapp.shell.currentWidget.context.path')=='course/01_look_alikes.ipynb'
    page.close()

@pytest.mark.parametrize('name', lessons)
def test_run_all(lab, browser, shots, name):
    "Every cell runs, none ends in an error or writes to stderr, figures are wide enough to see, and the file is as it was."
    path = course/f'{name}.ipynb'
    if not path.exists(): pytest.skip(f'no {path.name} yet')
    before = path.read_bytes()
    page = browser.new_page(viewport=dict(width=1280, height=900))
    opened(page, lab(f'lab/tree/course/{name}.ipynb') + '&reset')
    cells = run_all(page)
    page.screenshot(path=shots/f'lab_{name}.png')
    outs = [o for c in cells for o in c['outputs']]
    widths = figures(page, shots, name)
    page.close()
    assert [f"{o['ename']}: {o['evalue']}" for o in outs if o['output_type']=='error']==[]
    assert [o['text'] for o in outs if o.get('name')=='stderr']==[]
    assert widths and min(widths)>=600
    assert [c['n'] for c in cells]==sorted(c['n'] for c in cells) and cells[-1]['n']
    assert path.read_bytes()==before
