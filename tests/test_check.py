"The stages of `make test`: which run side by side, and what is printed when one fails."
import check

def test_side_by_side(monkeypatch, capsys):
    "What a stage printed comes in one piece; one that fails ends the run, and no later one begins"
    begun = []
    def captured(name):
        begun.append(name)
        return int(name=='wheel'),f'{name} speaks'
    monkeypatch.setattr(check, '_captured', captured)
    monkeypatch.setattr(check.os, 'cpu_count', lambda: 1)
    later = dict.fromkeys(check.alone, lambda: begun.append('later'))
    for k,f in later.items(): monkeypatch.setitem(check.stages, k, f)
    assert check.main([])==1 and begun[:2]==['docs','wheel'] and 'later' not in begun
    assert 'docs speaks\n' in capsys.readouterr().out
    monkeypatch.setattr(check, '_captured', lambda name: (0, f'{name} speaks'))
    assert check.main([])==0 and begun[-2:]==['later']*2
    said = capsys.readouterr().out
    assert all(f'{o} speaks\n' in said for o in check.stages if o not in check.alone) and 'passed side by side' in said

def test_a_stage_in_a_process_of_its_own():
    "Its exit status and what it printed, errors too"
    code,text = check._captured('nothing')
    assert code==1 and text.startswith('No stage nothing: the stages are docs, wheel')
