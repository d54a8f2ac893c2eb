//! Deterministic simulation of a fleet on request traces.
