//! Modules of the library over loopback or in virtual time, within this process.

mod embedded;
mod transport;
