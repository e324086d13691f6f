"""Models of any form: their forward is looked at call by call, planned as a graph, and watched while it runs."""

from .engine import GraphEngine
from .plan import as_chain, plan_network
from .record import record
from .trace import TraceError, trace

__all__ = ["GraphEngine", "TraceError", "as_chain", "plan_network", "record", "trace"]
