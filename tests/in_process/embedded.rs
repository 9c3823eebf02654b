//! The embedded broker, driven by exact packets in virtual time and by an
//! independent client over a real port.

mod client;
mod faults;
mod flows;
mod independent;
mod sessions;
