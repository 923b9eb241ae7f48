"Draw nbs/images/problem.png, the picture at the top of the README: python tools/problem_picture.py"
from pathlib import Path
import matplotlib, numpy as np
matplotlib.use('Agg')
from matplotlib import pyplot as plt
from PIL import Image
from cekd_fastai.drawing.bird import draw_bird
from cekd_fastai.drawing.species import bird_species

size,red,green = 224,'#c0392b','#1e8449'
a,b = bird_species(20)[0:2]
part = a.differ(b)[0]
host,donor = (draw_bird(s, np.random.default_rng(seed), size) for s,seed in ((a,8),(b,5)))

def box(parts, half=36):
    "A box around the part that differs, kept inside the picture"
    x,y = (int(np.clip(o, half, size-half)) for o in parts[part][:2])
    return x-half,y-half,x+half,y+half

ha,hb = box(host[2]),box(donor[2])
ims = [np.asarray(o[0]) for o in (host,donor)]
mixed = ims[0].copy()
mixed[ha[1]:ha[3],ha[0]:ha[2]] = ims[1][hb[1]:hb[3],hb[0]:hb[2]]
share = (ha[2]-ha[0])*(ha[3]-ha[1])/size**2

fig,axs = plt.subplots(1, 4, figsize=(12.4,3.9), width_ratios=[1,1,1,1.15], dpi=75, layout='constrained')
titles = (f'{a.name}\nthe {part} tells it from its sister', f'{b.name}\nthe {part} is what differs', f'mixed; the label counts pixels:\n{1-share:.0%} {a.name}, {share:.0%} {b.name}')
for ax,im,t,bx,c in zip(axs, [*ims,mixed], titles, (ha,hb,ha), (red,green,green)):
    ax.imshow(im)
    ax.add_patch(plt.Rectangle(bx[:2], bx[2]-bx[0], bx[3]-bx[1], fill=False, lw=2.5, ec=c))
    ax.set_title(t, fontsize=9.5)
    ax.axis('off')
axs[3].axis('off')
axs[3].text(0, .95, 'The only part that tells the two\napart now shows the other bird:\nthe label is wrong.\n\n'
    'CEKD adds a second opinion:\nwhat the network says about the\ntwo unmixed pictures. It goes to a\nbranch of its own, so no classifier\n'
    'hears two answers at once.', va='top', fontsize=11, linespacing=1.35)
Path('nbs/images').mkdir(exist_ok=True)
fig.canvas.draw()
Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert('RGB').quantize(128).save('nbs/images/problem.png', optimize=True)
