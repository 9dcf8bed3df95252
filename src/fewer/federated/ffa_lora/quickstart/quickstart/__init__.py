"""FFA-LoRA on handwritten digits, as a Flower app."""

from fewer.devices import keep_ray_local

# A simulation runs by Ray, whose servers would listen on all of the machine's addresses. Flower loads the app before Ray, so here is the
# place to say that they keep to this machine; take it away for a Ray cluster of several machines.
keep_ray_local()
