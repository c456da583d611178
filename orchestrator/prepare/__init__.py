"""From raw videos to a data set of the store: who prepares it, what it costs, and where it lies afterwards.

Owns the life of a preparation: its lease and its records in the store, the process `python -m opensora.prepare` that does the steps, the
copy of what that process has done so far, and the publication of what it made. Refuses to decode, caption or encode anything.
"""
