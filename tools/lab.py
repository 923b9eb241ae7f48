"""Bring the working copy of the notebooks up to date: python tools/lab.py

A learner works in `lab`, a copy of `nbs` that git ignores, so that a saved notebook changes nothing of the project. What the learner
has not touched follows the project; what the learner has changed stays, and a message names the lessons that have changed here since."""
import json,os,shutil
from hashlib import sha256
from pathlib import Path

root = Path(__file__).resolve().parent.parent
record = '.copied.json' # hash of each file when it was copied

def file_hash(path): return sha256(path.read_bytes()).hexdigest()

def sources(
    src, # Folder of the notebooks
):
    "Paths under `src` of the files that a working copy needs"
    hidden = lambda p: any(o.startswith(('.', '_')) for o in p.parts)
    found = [p.relative_to(src) for p in sorted(src.rglob('*')) if p.is_file()]
    return [p for p in found if not hidden(p)]

def read_record(
    dst, # Folder of the working copy
):
    "Hash of each file when it was copied; empty for a new copy or a damaged record, with which nothing is overwritten"
    try: return json.loads((dst/record).read_text(encoding='utf-8'))
    except (OSError, ValueError): return {}

def copy_whole(
    src, # File to copy
    dst, # Where to
):
    "Copy a file so that an interrupted copy leaves the old one"
    dst.parent.mkdir(parents=True, exist_ok=True)
    tmp = dst.with_name(f'{dst.name}.{os.getpid()}')
    shutil.copyfile(src, tmp)
    tmp.replace(dst)

def refresh(
    src, # Folder of the notebooks
    dst, # Folder of the working copy, which need not exist
):
    "Copy what is new or untouched; returns the paths that changed on both sides, of which the learner's stay"
    was,now,both = read_record(dst),{},[]
    for p in sources(src):
        new,mine = file_hash(src/p),dst/p
        key = p.as_posix()
        touched = mine.exists() and file_hash(mine) not in (new, was.get(key))
        if touched and was.get(key)!=new: both.append(key)
        if not touched: copy_whole(src/p, mine)
        now[key] = was.get(key, '') if touched else new
    for key in was.keys()-now.keys(): # removed from the project
        if (dst/key).exists() and file_hash(dst/key)==was[key]: (dst/key).unlink()
    dst.mkdir(parents=True, exist_ok=True)
    (dst/record).write_text(json.dumps(now, indent=1), encoding='utf-8')
    return both

def main():
    "Refresh `lab`, and name what changed on both sides"
    both = refresh(root/'nbs', root/'lab')
    for p in both: print(f'lab/{p} is yours and stays, but nbs/{p} has changed since you copied it: rename yours, and the next `make lab` brings the new one.')

if __name__=='__main__': main()
