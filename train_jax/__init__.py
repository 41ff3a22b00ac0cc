"""The engine: how any method is run. It knows states, meshes and checkpoints, and no method."""
