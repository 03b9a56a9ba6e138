"""Video coding: frames to packets (:mod:`.encode`) and packets to frames (:mod:`.decode`)."""
