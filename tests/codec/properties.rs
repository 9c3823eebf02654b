//! Properties that must hold for any bytes; the fuzz targets call the same functions.

pub(crate) mod packets;
pub(crate) mod topics;
