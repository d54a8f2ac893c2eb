//! Answers of engines, as recorded, and what is learnt from each.
