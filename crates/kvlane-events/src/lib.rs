//! Engine bytes to KV-cache events: wire decoders and the stream state machine.
