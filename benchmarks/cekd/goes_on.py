"A run on processors takes up to an hour: one that is killed goes on when it is started again, at the epoch where it was."
import json,time,zlib
from pathlib import Path
from cekd_fastai.all import Checkpoint
from cekd_fastai.core import write_whole

class GoesOn(Checkpoint):
    "Keeps the last epoch of a run, and beside it the seconds of all its starts and the commit of the first"
    def __init__(self, folder, commit=None, first_epoch=0):
        super().__init__(folder, keep=1, minutes=0, signals=False)
        self.first_epoch = first_epoch
        self.file,self.now = self.folder/'begun.json',time.time()
        was = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.spent,self.begun,self.commit = was.get('seconds', 0.),was.get('commit', commit),commit

    def before_epoch(self): self.learn.dls.train.epoch = self.first_epoch+self.learn.epoch # its crops, however many epochs were skipped
    def after_epoch(self):
        skipped = self.resumer is not None
        super().after_epoch()
        if skipped: return
        note = json.dumps(dict(seconds=self.spent+time.time()-self.now, commit=self.begun))
        write_whole(self.file, lambda p: p.write_text(note))

    def said(self):
        "For the row: where this lies until the row is written, and the commit of the first start if it is another"
        return dict(kept=str(self.folder)) | ({} if self.begun==self.commit else {'begun':self.begun})

def folder_of(c, j):
    "Where a run is kept, by all that defines it"
    what = json.dumps([j,c.get('precision')], sort_keys=True)
    return Path(c['keep'])/f"{c['name']}-{zlib.crc32(what.encode()):08x}"
