"""Clients with one interface: `ClipClient` calls a Triton server, `LocalClip` runs in process."""
