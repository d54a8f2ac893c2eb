//! Load ledger and the choice of a worker: filter, score, pick.
