"""The host's side of a run.

``drive`` is the loop that brings runs from saved point to saved point, ``flow_lanes`` the programs
that flows share, ``flow_run`` the plan of a flow, ``on_split`` its last leg, ``events`` what a run
does on its way, ``standstill`` why one goes no further. ``recorder``, ``extras``, ``checkpoint``,
``certify``, ``members`` and ``progress`` serve flow and descent alike.
"""
