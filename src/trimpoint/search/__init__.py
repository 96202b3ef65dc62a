"""The search: probe, propose, measure, halve, choose."""

from trimpoint.search.frontier import Frontier
from trimpoint.search.record import StudyRecord
from trimpoint.search.run import resume, search
from trimpoint.search.study import Best, Study, open_study, pick

__all__ = ["Best", "Frontier", "Study", "StudyRecord", "open_study", "pick", "resume", "search"]
