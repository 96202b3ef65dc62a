from trimpoint.progress import Silence
from trimpoint.search import heartbeat as module
from trimpoint.search.heartbeat import Heartbeat


def test_it_beats_every_five_seconds_of_work(monkeypatch):
    now, beats, shown = [100.0], [], []

    class Shown(Silence):
        def update(self, text="", fraction=None, best="", seconds_left=None):
            shown.append((text, fraction, best, seconds_left))

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Heartbeat(Shown(), lambda: beats.append(now[0]))
    for step in range(120):
        now[0] = 100.0 + step / 10
        progress.update("training", 0.5, "best", step)
    assert beats == [105.0, 110.0]
    assert len(shown) == 120
    assert shown[3] == ("training", 0.5, "best", 3)
