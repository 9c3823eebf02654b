//! Properties that must hold for any bytes; the fuzz targets call the same functions.

pub mod packets;
pub mod topics;
