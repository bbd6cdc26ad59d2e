"""The demo: distillation on real text in a few minutes on a CPU. ``run.run`` is the whole of it; it needs the extra ``demo``.

settings (what a run is made of) · corpus · models · train (loop, checkpoints) · samples (what the models write) · loss_step (time
and memory against eager PyTorch) · report (screen, JSON) · plot · onward (what the next command takes) · run
"""
