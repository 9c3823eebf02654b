//! What must hold of the repository itself.

mod conformance;
mod layering;
mod words;
