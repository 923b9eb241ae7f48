"""Draw the pictures that open the notebooks into nbs/images: python tools/pictures.py
With --check, only say whether the files are in step. Drawing fails where a label does not fit or is covered."""
import re,sys
from functools import lru_cache
from html import escape
from math import erf,hypot,sqrt
from pathlib import Path
from typing import NamedTuple
from matplotlib import get_data_path
from PIL import ImageFont

folder = Path(__file__).resolve().parent.parent/'nbs'/'images'
_alt = """
cekd: One training step of CEKD: a clean batch and a batch mixed from it pass a shared trunk and two heads. The label
head learns the mixed labels, the soft head learns a target made from both heads' predictions on the clean images, and
both heads learn the clean labels. At inference the mean of the two heads classifies a clean image.

mixing: MixUp blends two birds; CutMix and SnapMix paste the head of one onto the other. CutMix weighs the two labels
by pixels, SnapMix by how much of the network's attention each image keeps or brings.

branches: One shared trunk feeds n branches, each with a last stage and a head of its own. In training the network
returns the logits of every branch, in evaluation their mean as one tensor; a file for deployment holds the network or
one branch.

meal: Several frozen teachers and one student see the same image. Their feature maps are aligned to vectors and
compared, as are their logits, by similarity losses and by discriminators that tell teacher from student; no labels are
needed.

online: Three branches on one trunk teach each other. Their last maps are fused into a gate that weighs their logits
into an ensemble, the ensemble is the target of each branch, and a diversity loss keeps their classifiers apart.

css: Two networks of three branches each. Every branch sees the shared map without a corner of its own and predicts
class and corner together; branches of the same index teach each other, and each network averages its branches' class
predictions.

data: Class folders, a CSV file, a DataFrame or a benchmark in its official layout become an ImageTable of files,
labels and parts, which fine_grained_dls turns into DataLoaders. Each step checks the data and names what is wrong.

way_out: A learner is written by deploy into one file that holds weights, class names and how a picture becomes numbers,
and no code. From the file come answers in Python, a table for a whole folder, a web page, and an ONNX file for programs
without torch. An exported learner, which runs code when it is opened, stays with its owner.

house: The five rooms of the library in the order in which data meets them, data, mix, network, distillation and use,
with what each room does and what it never does.
"""
ALT = {k:' '.join(v.split()) for k,v in (o.split(': ', 1) for o in _alt.strip().split('\n\n'))} # by name of the file

# --- colours
class Ink(NamedTuple):
    "Colours of one kind of thing, the same in every picture"
    line:str # borders and arrows
    fill:str # surfaces
    text:str # text, on the surface and on the card

clean = Ink('#2563eb', '#e3edfd', '#1e3a8a') # unmixed images and predictions on them
mixed = Ink('#d9730d', '#fdeedd', '#7c3a06') # mixed images and predictions on them
soft  = Ink('#7c3aed', '#f0e9fe', '#4c1d95') # soft targets and their teachers
loss  = Ink('#c81e1e', '#fde8e8', '#8a1313') # what is minimised
trunk = Ink('#6b7280', '#e9ebef', '#1f2937') # what all branches share
kept  = Ink('#15803d', '#e3f5e9', '#14532d') # what predicts in the end
plain = Ink('#4b5563', '#ffffff', '#1f2937') # everything else
width,quiet,edge = 800,'#4b5563','#d0d7de'   # of the card in pixels; colours of remarks and of rules

def el(
    tag,      # such as 'rect'
    inner='', # what stands in it
    **attrs   # attributes, with `_` for `-`; numbers are rounded
): # SVG
    "An element of an SVG file"
    val = lambda v: v if isinstance(v, str) else f'{round(v, 1):g}'
    at = ''.join(f' {k.replace("_", "-")}="{val(v)}"' for k,v in attrs.items())
    return f'<{tag}{at}>{inner}</{tag}>' if inner else f'<{tag}{at}/>'

# --- text
sans = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,'DejaVu Sans',sans-serif"
mono = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
scale,shift = dict(sup=.75, sub=.75, code=.95),dict(sup=-.38, sub=.22) # of the letters' size
_marks = re.compile(r'\^\{(.+?)\}|_\{(.+?)\}|\*(.+?)\*|`(.+?)`')

def parts(
    s, # a line with `*italic*`, `` `code` ``, `^{superscript}` and `_{subscript}`
): # list of pairs: the kind of a part, and its text
    "A line taken apart at its marks"
    res,end = [],0
    for m in _marks.finditer(s):
        res += [('',s[end:m.start()]),(('sup','sub','it','code')[m.lastindex-1],m[m.lastindex])]
        end = m.end()
    return [o for o in [*res,('',s[end:])] if o[1]]

@lru_cache
def _font(name): return ImageFont.truetype(f'{get_data_path()}/fonts/ttf/{name}.ttf', 100)

def length(
    s,          # a line
    size,       # of its letters, in pixels
    bold=False, # drawn bold
): # pixels
    "How long the line is in DejaVu, which is wider than the fonts of most systems: what fits in it fits everywhere"
    font = lambda k: _font('DejaVuSans' + 'Mono'*(k=='code') + '-Bold'*bold)
    return sum(font(k).getlength(o)*scale.get(k, 1) for k,o in parts(s))*size/100

def spans(
    s,    # a line
    size, # of its letters, in pixels
): # SVG
    "The line as text of an SVG file; `dy` moves scripts, since not every browser knows `baseline-shift`"
    res,at = '',0
    for k,o in parts(s):
        look,to = {},shift.get(k, 0)*size
        if to!=at: look['dy'] = to-at
        if k=='it': look['font_style'] = 'italic'
        if k=='code': look['font_family'] = mono
        if k in scale: look['font_size'] = scale[k]*size
        res += el('tspan', escape(o, False), **look) if look else escape(o, False)
        at = to
    return res

# --- the sheet
class Box(NamedTuple):
    "A rectangle, and the points on its sides where arrows start and end"
    x:float # left edge
    y:float # upper edge
    w:float # width
    h:float # height
    def left(self, f=.5): return self.x,self.y+f*self.h
    def right(self, f=.5): return self.x+self.w,self.y+f*self.h
    def top(self, f=.5): return self.x+f*self.w,self.y
    def bottom(self, f=.5): return self.x+f*self.w,self.y+self.h
    def meets(self, o): return self.x<o.x+o.w and o.x<self.x+self.w and self.y<o.y+o.h and o.y<self.y+self.h
    def holds(self, o): return self.x<=o.x and o.x+o.w<=self.x+self.w and self.y<=o.y and o.y+o.h<=self.y+self.h

class Sheet:
    "A picture on a light card of its own, so that it can be read on any page"
    def __init__(self,
        name,       # of the file, and of its text in `ALT`
        height,     # in pixels
        title=None, # at the upper left
        note=None,  # at the upper right
    ):
        self.name,self.height,self.out,self.words,self.lines = name,height,[],[],[]
        self.out.append(el('rect', x=.5, y=.5, width=width-1, height=height-1, rx=12, fill='#fbfcfd', stroke=edge))
        if title: self.text(24, 28, title, 15, 'start', plain.text, 1)
        if note: self.text(776, 28, note, anchor='end', color=loss.text)

    def text(self,
        x,y,           # the point that `anchor` and the middle of the lines stand at
        s,             # lines, with `|` between them
        size=12.5,     # of the letters, in pixels
        anchor='middle', # or 'start', 'end'
        color=quiet,   # of the letters
        bold=0,        # how many of the first lines are bold
    ):
        "Write lines of text"
        lines,step = s.split('|'),size*1.3
        top = y-step*len(lines)/2
        for i,o in enumerate(lines):
            w = length(o, size, i<bold)
            left = x-w*dict(start=0, middle=.5, end=1)[anchor]
            self.words.append((o,Box(left, top+i*step+.1, w, step-.2)))
            look = dict(font_size=size, fill=color, text_anchor=anchor) | (dict(font_weight=600) if i<bold else {})
            if o: self.out.append(el('text', spans(o, size), x=x, y=top+(i+.5)*step+.35*size, **look))

    def box(self,
        x,y,w,h,     # left and upper edge, width and height
        s='',        # lines in the middle, with `|` between them
        ink=plain,   # colours
        bold=1,      # how many of the first lines are bold
        size=12.5,   # of the letters, in pixels
        dash=False,  # a dashed border and no surface
        r=7,         # radius of the corners
    ): # `Box`
        "Draw a box with text"
        over = max(length(o, size, i<bold) for i,o in enumerate(s.split('|')))-w+6
        if s and over>0: raise ValueError(f'{self.name}: the text {s!r} is {over:.0f} pixels too wide for its box')
        look = dict(fill='none', stroke_dasharray='5 4') if dash else dict(fill=ink.fill, stroke_width=1.4)
        self.out.append(el('rect', x=x, y=y, width=w, height=h, rx=r, stroke=ink.line, **look))
        if s: self.text(x+w/2, y+h/2, s, size, color=ink.text, bold=bold)
        return Box(x, y, w, h)

    def arrow(self,
        *pts,        # where the line begins, turns and ends
        ink=plain,   # colours
        both=False,  # a head at the beginning too
        head=True,   # a head at the end
    ):
        "Draw a line with round corners and heads that end at its points"
        pts = list(dict.fromkeys(pts)) # a turn that is none
        for (a,b),(c,d) in zip(pts, pts[1:]): self.lines.append(Box(min(a,c)-1, min(b,d)-1, abs(a-c)+2, abs(b-d)+2))
        heads = [(pts[-1],pts[-2])]*head + [(pts[0],pts[1])]*both
        if head: pts[-1] = _toward(pts[-1], pts[-2], 6) # the line must not show beside the tip
        if both: pts[0] = _toward(pts[0], pts[1], 6)
        d = _path('M', pts[0])
        for a,b,c in zip(pts, pts[1:], pts[2:]): d += _path('L', _toward(b, a, 7)) + _path('Q', b, _toward(b, c, 7))
        d += _path('L', pts[-1])
        self.out.append(el('path', d=d, fill='none', stroke=ink.line, stroke_width=1.8))
        for tip,back in heads: self.out.append(el('path', d=_head(tip, back), fill=ink.line))

    def dot(self, x, y, ink=plain):
        "Join lines"
        self.out.append(el('circle', cx=x, cy=y, r=3.4, fill=ink.line))

    def rule(self, x, y, x2):
        "Draw a quiet rule"
        self.out.append(el('path', d=f'M{x} {y}H{x2}', stroke=edge))

    def image(self,
        x,y,size, # left and upper edge, and side
        art,      # SVG, 100 wide and high
        ink=clean # colours of the frame
    ): # `Box`
        "Draw a picture in a frame"
        at = dict(x=x, y=y, width=size, height=size)
        self.out.append(el('svg', art, **at, viewBox='0 0 100 100'))
        self.out.append(el('rect', **at, rx=4, fill='none', stroke=ink.line, stroke_width=2.4))
        return Box(x, y, size, size)

    def faults(self):
        "What cannot be read: words outside the card, over other words, or under a line"
        card = Box(8, 4, width-16, self.height-8)
        for i,(s,b) in enumerate(self.words):
            if not card.holds(b): yield f'{s!r} leaves the card'
            core = Box(b.x, b.y+.15*b.h, b.w, .7*b.h)
            yield from (f'{s!r} lies over {t!r}' for t,o in self.words[:i] if b.meets(o))
            yield from (f'{s!r} is crossed by a line at {o.x:.0f}, {o.y:.0f}' for o in self.lines if core.meets(o))

    def svg(self):
        "The file's text; spaces are preserved, or those beside marks would be lost"
        if bad := list(self.faults()): raise ValueError(f'{self.name}: {"; ".join(bad)}')
        inner = '\n'.join(['', el('desc', escape(ALT[self.name], False)), *self.out, ''])
        at = dict(width=width, height=self.height, viewBox=f'0 0 {width} {self.height}', role='img', font_family=sans)
        return el('svg', inner, xmlns='http://www.w3.org/2000/svg', **{'xml:space':'preserve'}, **at) + '\n'

def _path(cmd, *pts): return cmd + ' '.join(f'{round(x, 1):g} {round(y, 1):g}' for x,y in pts)

def _toward(a, b, d):
    "The point at distance `d` from `a` on the way to `b`, at most half of the way"
    t = min(d/hypot(b[0]-a[0], b[1]-a[1]), .5)
    return a[0]+t*(b[0]-a[0]),a[1]+t*(b[1]-a[1])

def _head(tip, back):
    "Path of an arrowhead"
    n = hypot(tip[0]-back[0], tip[1]-back[1])
    u,v = (tip[0]-back[0])/n,(tip[1]-back[1])/n
    return _path('M', tip) + _path('L', *((tip[0]-8*u-k*v, tip[1]-8*v+k*u) for k in (4.2,-4.2))) + 'Z'

# --- birds
def bird(
    sky,upper,under, # colours of the background, of back and wing, and of the belly
    crown,bill,      # colours of crown and bill
    beak,            # path of the bill
): # SVG, 100 wide and high
    "A bird of flat shapes, looking right"
    shape = lambda d,color: el('path', d=d, fill=color)
    stroke = lambda d,color,**kw: el('path', d=d, fill='none', stroke=color, stroke_width=2.2, **kw)
    return ''.join((el('rect', width=100, height=100, fill=sky),
        shape('M0 90Q50 82 100 88V94Q50 88 0 96Z', '#8b6b4a'), stroke('M44 70V86M53 70V86', '#5b4636'),
        shape('M32 60L4 80L12 86L40 70Z', upper), shape('M24 66Q26 36 58 28L76 40Q78 74 48 76Q30 76 24 66Z', under),
        el('circle', cx=65, cy=32, r=15, fill=upper), shape('M51 28A15 15 0 0 1 79 28Q65 22 51 28Z', crown),
        shape(beak, bill), el('circle', cx=70, cy=31, r=2.6, fill='#111'),
        shape('M22 66Q30 42 54 42Q60 60 46 66Q34 70 22 66Z', upper),
        stroke('M30 62Q42 60 50 50', '#fff', stroke_opacity='.5')))

host = bird('#dcebf5', '#7d6245', '#e6d5b4', '#3b3128', '#3f3a35', 'M77 30L96 33L77 36Z')
donor = bird('#e3efd9', '#64727c', '#dedbd0', '#c0392b', '#e0912f', 'M77 27Q92 29 96 36Q86 40 76 38Z')
box_a,box_b = Box(46, 8, 52, 42),Box(34, 2, 64, 52) # what is pasted over in the host, and what is taken from the donor
look = 66,31,15 # where the network looks: centre and standard deviation

def frame(b, w):
    "A dashed frame of lines `w` wide"
    at = dict(x=b.x, y=b.y, width=b.w, height=b.h)
    return el('rect', **at, fill='none', stroke=mixed.line, stroke_width=w, stroke_dasharray='5 3')

def paste(b):
    "Box `b` of the donor in the box of the host"
    view = f'{b.x} {b.y} {b.w} {b.h}'
    at = dict(x=box_a.x, y=box_a.y, width=box_a.w, height=box_a.h)
    patch = el('svg', donor, **at, viewBox=view, preserveAspectRatio='none')
    return host + patch + frame(box_a, 1.6)

def attention(art, b):
    "An image, where the network looks, and a box"
    x,y,r = look
    rings = (el('circle', cx=x, cy=y, r=r*k, fill='#ff3b00', fill_opacity='.17') for k in (2,1.6,1.2,.8,.4))
    return art + ''.join(rings) + frame(b, 3)

def mass(b):
    "Share of what the network looks at inside a box"
    x,y,r = look
    cdf = lambda v: (1+erf(v/r/sqrt(2)))/2
    within = lambda lo,hi,c: (cdf(lo+hi-c)-cdf(lo-c))/(cdf(100-c)-cdf(-c))
    return within(b.x, b.w, x)*within(b.y, b.h, y)

# --- the pictures
def cekd():
    "Two batches, one trunk, two heads, three losses"
    s = Sheet('cekd', 478, 'A training step of CEKD', 'the sum of the three losses is minimised')
    s.text(89, 62, 'clean batch *x*', 13, color=clean.text, bold=1)
    s.text(89, 341, 'mixed batch *x̃*', 13, color=mixed.text, bold=1)
    a,b,m = s.image(24, 76, 62, host),s.image(92, 76, 62, donor),s.image(58, 262, 62, paste(box_a), mixed)
    s.text(55, 149, 'host')
    s.text(123, 149, 'donor')
    s.arrow((55,162), (55,178), (89,178), m.top(), ink=mixed)
    s.arrow((123,162), (123,178), (89,178), (89,200), ink=mixed, head=False)
    s.text(98, 204, 'mix', 12.5, 'start', mixed.text, 1)
    s.text(98, 230, 'label weights|*λ*^{a}, *λ*^{b}', 12, 'start', mixed.text)
    s.box(196, 76, 86, 296, 'Shared|trunk||runs once|for both|heads', trunk, 2)
    s.box(330, 76, 104, 86, 'Soft head||its own last|stage', soft)
    s.text(382, 217, 'no head is given|two targets for|a mixed image', 12)
    s.box(330, 272, 104, 100, 'Label head||its own last|stage')
    s.arrow(b.right(), (196,107), ink=clean)
    s.arrow(m.right(), (196,293), ink=mixed)
    for y,ink in ((98,mixed),(140,clean),(294,clean),(350,mixed)): s.arrow((282,y), (330,y), ink=ink)
    s.box(612, 75, 164, 46, 'Cross-distillation|KL to the target *q*', loss)
    s.box(612, 271, 164, 46, 'Clean label loss|both heads, clean images', loss, size=12)
    s.box(612, 327, 164, 46, 'Mixed label loss|labels weighed by *λ*', loss)
    s.arrow((434,98), (612,98), ink=mixed)
    s.arrow((434,294), (612,294), ink=clean)
    s.arrow((434,140), (460,140), (460,294), ink=clean, head=False)
    s.arrow((434,350), (612,350), ink=mixed)
    for y in (212,294): s.dot(460, y, clean)
    fused = 'Cross target *q*|mean of both heads,|host and donor|fused by *λ*^{a}, *λ*^{b}'
    q = s.box(490, 170, 172, 84, fused, soft)
    s.arrow((460,212), q.left(), ink=clean)
    s.arrow(q.right(), (700,212), (700,121), ink=soft)
    s.text(708, 165, 'no|gradient', 12, 'start', soft.text)
    for y,o,c in ((86,'mixed',mixed),(282,'clean',clean),(338,'mixed',mixed)): s.text(530, y, o, color=c.text)
    s.rule(24, 400, 776)
    s.text(24, 441, 'Inference', 15, 'start', plain.text, 1)
    row = [s.image(128, 419, 44, host)]
    for x,w,o,ink in ((210,100,'Trunk',trunk),(348,112,'Both heads',plain),
        (498,122,'Mean of logits',kept),(658,118,'One class',kept)):
        row.append(s.box(x, 421, w, 40, o, ink))
        s.arrow(row[-2].right(), row[-1].left(), ink=kept if x==658 else clean)
    return s

def mix(s, x, name, art, weights, does, why):
    "One mix, the label weights that it gives, and why"
    s.text(x+70, 28, name, 14, color=mixed.text, bold=1)
    s.image(x, 52, 140, art, mixed)
    s.text(x+70, 208, does)
    for y,v,o in zip((238,259), weights, 'AB'):
        s.text(x, y, o, 12.5, 'start', plain.text, 1)
        s.box(x+16, y-7, 84*v, 14, '', mixed, r=2)
        s.text(x+140, y, f'{v:.2f}', 12.5, 'end', plain.text)
    s.text(x+70, 306, why, 12)

def mixing():
    "Three mixes and their label weights"
    s = Sheet('mixing', 352)
    la,lb,share = 1-mass(box_a),mass(box_b),box_a.w*box_a.h/1e4
    s.text(80, 28, 'Clean images', 14, color=clean.text, bold=1)
    for y,o,art in ((52,'host, label A',host),(204,'donor, label B',donor)):
        s.image(24, y, 112, art)
        s.text(80, y+126, o)
    both = host + el('g', donor, opacity='.4')
    mix(s, 172, 'MixUp', both, (.6,.4), 'blends all pixels', 'labels are blended|as the pixels are')
    why = "labels count pixels,|although the head that|tells A from B is B's"
    mix(s, 342, 'CutMix', paste(box_a), (1-share,share), 'pastes a box', why)
    why = 'labels count where the|network looks: what A|keeps and what B brings'
    mix(s, 512, 'SnapMix', paste(box_b), (la,lb), 'pastes a resized box', why)
    s.text(728, 28, 'Class maps', 14, color=clean.text, bold=1)
    for y,art,b,o in ((52,host,box_a,f'outside: {la:.2f}'),(164,donor,box_b,f'inside: {lb:.2f}')):
        s.image(686, y, 84, attention(art, b))
        s.text(728, y+96, o, 12)
    s.text(728, 306, 'the two need|not sum to 1', 12)
    return s

def branches():
    "One trunk, n branches, and what each use gets"
    s = Sheet('branches', 366, 'One network, *n* branches')
    i,t = s.image(24, 148, 64, host),s.box(114, 82, 118, 196, '', trunk)
    s.text(56, 132, 'images', 12.5, color=clean.text, bold=1)
    s.text(56, 229, '(*B*, 3, *H*, *W*)', 12)
    s.text(173, 104, 'Shared trunk', 13, color=trunk.text, bold=1)
    for y,o in zip((124,153,182,211), ('stem','stage 1','stage 2','stage 3')): s.box(132, y, 82, 24, o, bold=0, size=12)
    s.text(173, 258, 'runs once', 12)
    s.arrow(i.right(), t.left(), ink=clean)
    for y,o in ((72,'0'),(158,'1'),(256,'*n* – 1')):
        s.text(262, y-10, f'branch {o}', 12, 'start', plain.text, 1)
        a,b = s.box(262, y, 96, 44, 'last stage|of its own', bold=0, size=12),s.box(384, y, 66, 44, 'head', bold=0)
        s.arrow(t.right(), (247,180), (247,y+22), a.left(), ink=trunk)
        s.arrow(a.right(), b.left())
        s.arrow(b.right(), (486,y+22), (486,180), head=False)
    s.text(356, 222, '⋮', 20)
    s.dot(486, 180)
    for y,o,ink in ((55,'Training|every branch: logits (*n*, *B*, *K*)|and *n* last feature maps',plain),
        (145,'Evaluation|the mean of the branches:|one tensor (*B*, *K*)',kept),
        (235,'Deployment|one file with the network,|or with one of its branches',kept)):
        s.arrow((486,180), (520,180), (520,y+35), s.box(556, y, 220, 70, o, ink).left())
    s.rule(24, 322, 776)
    where = 'before the last stage, at any stage or block, or only before the head'
    s.text(400, 344, f'`split` says where the trunk ends: {where}', 12)
    return s

def meal():
    "Frozen teachers, a student, and what compares them"
    s = Sheet('meal', 462, 'A training step of MEAL', 'the sum of the losses in red is minimised')
    i = s.image(24, 196, 72, host)
    s.text(60, 300, 'images,|no labels|needed', color=clean.text)
    for d in (12,6,0): s.box(130+d, 64-d, 634, 74, '', soft)
    s.box(130, 364, 634, 74, '', trunk)
    s.text(146, 82, 'Teachers: trained, frozen, of any architecture', 13, 'start', soft.text, 1)
    s.text(752, 82, 'one, each, or their mean in a step', 12, 'end', soft.text)
    s.text(146, 421, 'Student: one network of ordinary size, which learns', 13, 'start', trunk.text, 1)
    s.arrow((96,221), (113,221), (113,115), (130,115), ink=clean)
    s.arrow((96,243), (113,243), (113,387), (130,387), ink=clean)
    for x,o,w in ((158,'stage 3 map','0.01'),(364,'stage 4 map','0.05'),(570,'logits','1')):
        t,u = (s.box(x, y, 170, 32, o, bold=0) for y in (98,372))
        sim = s.box(x-10, 222, 76, 60, f'Similarity|weight|{w}', loss, size=12)
        dis = s.box(x+74, 222, 106, 60, 'Discriminator|teacher or|student?', loss, size=12)
        if o!='logits':
            a,b = (s.box(x, y, 170, 26, 'align: pool to a vector', bold=0, size=12) for y in (160,318))
            s.arrow(t.bottom(), a.top(), ink=soft)
            s.arrow(u.top(), b.bottom(), ink=trunk)
            s.arrow((x+170,114), (x+206,114), ink=soft)
            s.arrow((x+170,388), (x+206,388), ink=trunk)
            t,u = a,b
        for m in (sim,dis):
            s.arrow((m.top()[0],t.y+t.h), m.top(), ink=soft)
            s.arrow((m.top()[0],u.y), m.bottom(), ink=trunk)
    return s

def online():
    "Branches, a gate, an ensemble, and two losses"
    s = Sheet('online', 502, 'A training step of FFM + CD', 'the sum of the losses in red is minimised')
    i,t = s.image(24, 133, 64, host),s.box(112, 60, 78, 210, 'Shared|trunk', trunk, 2)
    f = s.box(222, 318, 146, 52, 'Feature fusion|join, convolve, pool', size=12)
    g = s.box(404, 318, 80, 52, 'Gate|softmax *g*')
    e = s.box(532, 318, 142, 52, 'Ensemble|*z*_{e}, the sum of *g*_{i} *z*_{i}', soft)
    c = s.box(718, 318, 58, 52, 'CE|label', loss)
    s.arrow(i.right(), t.left(), ink=clean)
    for k,y in enumerate((60,139,218), 1):
        a = s.box(222, y, 100, 52, f'Branch {k}|last map *f*_{{{k}}}')
        h = s.box(366, y, 106, 52, f'Classifier *W*_{{{k}}}|logits *z*_{{{k}}}', size=12)
        o = s.box(532, y, 142, 52, f'CE to the label|KD from *z*_{{e}} to *z*_{{{k}}}', loss, 0)
        s.arrow((190,y+26), a.left(), ink=trunk)
        s.arrow(a.right(), h.left())
        s.arrow(h.right(), o.left())
        s.arrow((696,344), (696,y+26), o.right(), ink=soft)
        for x in (344,502): s.dot(x, y+26)
        if k==3: continue
        s.arrow((419,y+52), (419,y+79), ink=loss, both=True)
        s.text(427, y+65.5, 'CD loss', 12, 'start', loss.text, 1)
    s.text(420, 291, 'CD keeps|classifiers apart', 12, color=loss.text)
    s.arrow((344,86), (344,318))
    s.arrow((502,86), (502,296), (603,296), e.top())
    for a,b,ink in ((f,g,plain),(g,e,plain),(e,c,soft)): s.arrow(a.right(), b.left(), ink=ink)
    s.dot(696, 344, soft)
    s.text(706, 178, 'target,|without|gradient', 12, 'start', soft.text)
    s.rule(24, 396, 776)
    s.text(24, 419, 'The same branches, other targets', 13, 'start', plain.text, 1)
    for x,o in ((80,'ONE|the gate sees the|shared map'),(243,'OKDDip|a mix of its own for each|peer; a leader is kept'),
        (405,'FFL|two branches and a|fused classifier'),(560,'DML|every branch teaches|every other'),
        (710,'KDCL|the plain mean of|all branches')): s.text(x, 461, o, 12, color=plain.text, bold=1)
    return s

def grid(s, x, y, hole):
    "A shared map of 4 by 4 places without the place at row and column `hole`"
    for k in range(16):
        fill = '#fff' if divmod(k, 4)==hole else '#aeb4bd'
        s.out.append(el('rect', x=x+11*(k%4), y=y+11*(k//4), width=11, height=11, fill=fill, stroke='#fbfcfd'))
    s.box(x, y, 44, 44, '', trunk._replace(fill='none'), r=2)

def cells(s, x, y, i):
    "Joint logits of three classes and three corners; those of corner `i` are filled"
    for k in range(9):
        fill = plain.line if k%3==i else '#fff'
        s.out.append(el('rect', x=x+12*k+5*(k//3), y=y, width=11, height=16, rx=2, fill=fill, stroke=plain.line))

def css():
    "Two networks of three branches, and who teaches whom"
    s = Sheet('css', 500, 'A training step of CSS')
    s.image(24, 232, 64, host)
    s.text(56, 310, 'images', color=clean.text)
    c = s.box(672, 246, 92, 36, 'One class', kept)
    for n,begin,end in ((1,(56,232),c.top()),(2,(56,322),c.bottom())):
        at = lambda y,h=0: y if n==1 else 528-y-h # the second network mirrors the first
        s.arrow(begin, (56,at(69)), (130,at(69)), ink=clean)
        s.box(130, at(52, 34), 500, 34, f'Network {n}: shared trunk', trunk)
        for k,(x,hole) in enumerate(zip((142,312,482), ((0,0),(3,3),(3,0)))): # the removed corner of each branch
            grid(s, x, at(110, 44), hole)
            s.box(x+68, at(110, 44), 68, 44, f'Branch|{k+1}', bold=0)
            cells(s, x+12, at(186, 16), k)
            s.arrow((x+22,at(86)), (x+22,at(110)), ink=trunk)
            s.arrow((x+44,at(132)), (x+68,at(132)), ink=trunk)
            s.arrow((x+102,at(154)), (x+102,at(178)))
        s.box(130, at(178, 50), 500, 50, dash=True)
        s.text(380, at(215), 'cross-entropy with the joint label: class and corner', 12, color=loss.text)
        m = s.box(660, at(178, 50), 116, 50, 'Mean of the|filled logits', kept, 0)
        s.arrow((630,at(203)), m.left(), ink=kept)
        s.arrow((718,at(228)), end, ink=kept)
    for x in (208,378,548):
        s.arrow((x,228), (x,300), ink=soft, both=True)
        s.text(x+8, 264, 'KD', 12.5, 'start', soft.text, 1)
    s.text(646, 132, 'each branch sees the|map without a corner|of its own', 12, 'start')
    s.text(646, 396, 'the network with the|larger loss learns|more from the other', 12, 'start', soft.text)
    return s

def data():
    "From files to batches, and what is checked on the way"
    s = Sheet('data', 390)
    t,f = s.box(228, 48, 158, 208),s.box(424, 48, 146, 208, '', trunk)
    for x,o in ((104,'What you have'),(307,'`ImageTable`'),(497,'`fine_grained_dls`'),(692,'`DataLoaders`')):
        s.text(x, 28, o, 13.5, color=plain.text, bold=1)
    for y,o in ((48,'Class folders|one folder per class'),(102,'CSV file|file, label, part'),
        (156,'DataFrame|file, label, part'),(210,'Benchmark|in its official layout')):
        s.arrow(s.box(24, y, 160, 46, o, clean).right(), (204,y+23), (204,152), t.left(), ink=clean)
    rows = 'file label part','01.jpg Wren train','02.jpg Wren valid','03.jpg Chat train','04.jpg Chat test'
    for y,row in zip((70,111,152,193,234), rows):
        for x,o in zip((238,292,344), row.split()): s.text(x, y, o, 12, 'start', plain.text, y==70)
    s.rule(236, 91, 378)
    for y,o in ((61,'open'),(110,'scale and crop'),(159,'augment'),(208,'normalise')): s.box(438, y, 118, 35, o, bold=0)
    s.arrow(t.right(), f.left())
    for y,o in ((48,'Training|shuffled, or balanced'),(126,'Validation|in order'),
        (204,'Official test|where it is set apart')):
        s.arrow(f.right(), (589,152), (589,y+26), s.box(608, y, 168, 52, o, clean).left(), ink=clean)
    s.text(24, 285, 'Checked on the way', 13.5, 'start', plain.text, 1)
    check = lambda x,w,o: s.box(x, 304, w, 62, o, bold=0, size=12, dash=True)
    check(24, 160, 'hashes of downloads,|safe unpacking,|official counts')
    check(206, 192, 'each file once, in one part;|training images for|every class')
    check(418, 162, 'pictures that cannot|be read; batch no larger|than the set')
    check(600, 176, 'duplicates, leaks and|suspicious pictures,|when you ask')
    return s

def way_out():
    "From a learner to those who use what it has learned"
    s = Sheet('way_out', 330, 'Out of the notebook')
    learn = s.box(24, 92, 176, 104, 'Learner|trained, stopped,|resumed, tuned', trunk)
    file = s.box(300, 84, 170, 120, '`birds.pt`|weights, class names,|how a picture|becomes numbers;|no code', kept)
    own = s.box(24, 244, 176, 62, '`model.pkl`|runs code when opened:|keep it yourself', plain, dash=True)
    s.arrow(learn.right(), file.left(), ink=kept)
    s.text(250, 130, "`deploy`", 12)
    s.arrow(learn.bottom(), own.top())
    s.text(122, 220, "`learn.export`", 12, "start")
    for y,o in ((44,'Python|`Deployed(file).predict`'),(112,'A folder of photographs|a table, by `cekd-predict`'),(180,'A web page|names and maps, by `cekd-serve`'),
        (248,'Programs without torch|an ONNX file, by `export_onnx`')):
        s.arrow(file.right(), (500,144), (500,y+26), s.box(536, y, 240, 52, o, kept).left(), ink=kept)
    return s

def room(s, x, ink, name, modules, does, never):
    "One room, with an arrow to the next"
    s.box(x, 108, 140, 242, '', ink)
    s.text(x+70, 130, name, 14.5, color=ink.text, bold=1)
    s.text(x+70, 154+8*len(modules.split('|')), modules, 12, color=ink.text)
    s.text(x+70, 236, does, color=ink.text)
    s.rule(x+12, 272, x+128)
    s.text(x+70, 312, f'never|{never}', color=ink.text, bold=1)
    if x<636: s.arrow((x+140,229), (x+153,229))

def house():
    "The rooms, and what each never does"
    s = Sheet('house', 412)
    s.out.append(el('path', d='M20 96L400 22L780 96Z', fill=trunk.fill, stroke=trunk.line, stroke_linejoin='round'))
    s.text(400, 66, '`cekd_fastai`', 16, color=plain.text, bold=1)
    does = 'a benchmark or|your pictures|as DataLoaders'
    room(s, 24, clean, 'Data', '`data.*`|`synthetic`', does, 'trains, or knows|a method')
    does = 'a mixed batch|and a record of|how it was made'
    room(s, 177, mixed, 'Mix', '`mix.*`', does, 'touches labels|or loss_func')
    does = 'one trunk and|*n* branches of|any backbone'
    room(s, 330, trunk, 'Network', '`arch` `branches`|`ema`', does, 'knows a loss|or a method')
    does,modules = 'pure losses, and|a callback for|each paper','`losses` `distill`|`cekd` `meal.*`|`online.*` `css`'
    room(s, 483, soft, 'Distillation', modules, does, 'draws the mix,|or builds data')
    does,modules = 'learners, a look|inside, a file|to deploy','`learner` `interpret`|`deploy` `train`|`cli`'
    room(s, 636, kept, 'Use', modules, does, 'holds|a loss')
    s.box(24, 364, 752, 30, '`core`: what every room needs', trunk, 0)
    return s

pictures = cekd,mixing,branches,meal,online,css,data,way_out,house

def main(
    check=False # only compare
):
    "Draw every picture, or name the files that are out of step"
    todo = {folder/f'{f.__name__}.svg':f().svg() for f in pictures}
    stale = [k for k,v in todo.items() if not k.exists() or k.read_text('utf8')!=v]
    if check and stale: sys.exit(f'{", ".join(o.name for o in stale)} in nbs/images: run `python tools/pictures.py`.')
    for k in stale: k.write_text(todo[k], 'utf8')

if __name__=='__main__': main('--check' in sys.argv[1:])
