//! A model of an inference engine: block pool, eviction, timing, event encoders.
