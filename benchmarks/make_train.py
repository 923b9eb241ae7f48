"The main job, `make train`: plain, plain with SnapMix, and CEKD on the drawn birds, each for the same number of epochs."
import sys
from common import defaults,here,table
from cekd_fastai.cli import one_sentence,run

# One network and schedule for all three; 84 pixels are a crop from the 96 of the drawn birds
common = dict(data='synthetic', arch='resnet18', arch_args=['channels=(32,64,128,256)'], no_pretrained=True, size=84, bs=32, epochs=16, lr=3e-3, wd=.05, num_workers=0, force=True)
methods = {'plain': dict(method='plain', mix='none'), 'plain + SnapMix': dict(method='plain', mix='snapmix'), 'CEKD + SnapMix': dict(method='cekd', mix='snapmix')}

def main():
    "Train the three and print their table"
    rows = []
    for label,kw in methods.items():
        print(f'\n{label}', flush=True)
        out = here.parent/'runs'/'make_train'/label.replace(' ', '')
        rows.append(dict(method=label, **run(defaults | common | kw | dict(out=str(out)))))
    print(f'\nTest accuracy after {common["epochs"]} epochs on 20 species of drawn birds, seed {defaults["seed"]}:\n\n{table(rows)}\n\nReports and models: {here.parent/"runs"/"make_train"}')

if __name__=='__main__':
    try: main()
    except (ValueError,OSError) as e: sys.exit(f'make train: {one_sentence(e)}')
    except KeyboardInterrupt: sys.exit(130)
