//! A small in-process broker.
