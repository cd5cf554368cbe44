"""The flow past the wall of float64, in coordinates that lose nothing small.

``geometry`` sees the data from the maximum-margin direction, ``state`` holds the coordinates,
``field`` is what moves them, ``walk`` steps along it, ``observables`` reads them, and
``slow_manifold`` is the solver that users name.
"""
