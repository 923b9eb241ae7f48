"The processes that other tests start: fresh, with an exit status, and what they write."
import signal
import forks,pytest,torch

def test_a_script_meets_what_a_fresh_process_does(tmp_path):
    "It has its own variables and arguments, and has imported neither this package nor the tests"
    code = "import os,sys\nprint(*sys.argv[1:], os.environ['OWN'], [o for o in sys.modules if o.startswith(('cekd','test_','conftest'))], __name__)\nsys.exit('a fault')"
    p = forks.run(code, 'a', 2, env=dict(OWN='mine'))
    assert p.stdout=='a 2 mine [] __main__\n' and p.returncode==1 and p.stderr.endswith('a fault\n')

def test_end():
    "One that takes too long is killed, a signal reaches its handler, and a fault shows where it is"
    p = forks.start('import time\ntime.sleep(99)')
    assert not p.until(lambda: False, timeout=0) and p.wait()==-9
    p = forks.start('import sys,time\ntry:\n    print(1)\n    time.sleep(99)\nexcept KeyboardInterrupt: sys.exit(130)')
    assert p.until(p.written)=='1\n'
    p.send_signal(signal.SIGINT)
    assert p.wait()==130
    p = forks.run('1/0')
    assert p.returncode==1 and 'line 1' in p.stderr and 'ZeroDivisionError' in p.stderr

def _fails(rank, world):
    if rank: raise ValueError('rank 1')
    return torch.ones(1)

def test_a_rank_that_fails_ends_the_others(tmp_path):
    with pytest.raises(AssertionError, match='rank 1'): forks.one_and_two(_fails, tmp_path)
