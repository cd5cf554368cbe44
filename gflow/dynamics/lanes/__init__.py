"""Flows of small networks side by side, in lanes that are refilled as members finish.

``pool`` is the host's side, ``machine`` the loop on the device, ``newton`` a correction of all
lanes, ``algebra`` products of small matrices with the members in the last axis.
"""
