//! What the device can do at the most: its name, its clocks, and the bandwidth of a copy.

use std::sync::Arc;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::timing::{Marks, Times};
use crate::cuda::{Device, DeviceMemory, Stream};

/// Bytes copied at a time, where there is room.
const COPY_BYTES: u64 = 2 << 30;
/// Copies timed, after some that are not.
const COPIES: usize = 20;
const WARM_COPIES: usize = 3;

/// A device and its measured bandwidth.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Machine {
    /// Name of the device.
    pub device: String,
    /// The newest CUDA version that its driver supports.
    pub driver: String,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Highest clock of the multiprocessors, in MHz; what they ran at meanwhile may be less.
    pub clock_mhz: u32,
    /// Highest clock of the memory, in MHz.
    pub memory_clock_mhz: u32,
    /// Bytes of one copy on the device.
    pub copy_bytes: u64,
    /// Times of such copies.
    pub copy: Times,
    /// Bytes read and written a second by the median copy.
    pub bytes_per_second: f64,
}

/// Measures copies on a device. Needs some of its memory for a moment, so it comes before a plan's pool.
///
/// # Errors
/// Hardly any memory is free, or the device failed.
pub fn measure_machine(device: &Arc<Device>) -> Result<Machine> {
    let (free, total) = device.memory()?;
    let copy_bytes = (free / 4).min(COPY_BYTES) & !0xfff;
    ensure!(
        copy_bytes >= 64 << 20,
        "device memory: expected 256 MiB free to measure copies in, found {free} bytes of {total} on {}; free the device",
        device.name
    );
    let bytes = usize::try_from(copy_bytes)?;
    let stream = Stream::new(device)?;
    let (from, to) = (DeviceMemory::new(device, bytes)?, DeviceMemory::new(device, bytes)?);
    from.fill(0..bytes, 0x5a, &stream)?;
    for _ in 0..WARM_COPIES {
        to.copy_from(&from, bytes, &stream)?;
    }
    let mut marks = Marks::new(device, COPIES)?;
    marks.record(&stream)?;
    for _ in 0..COPIES {
        to.copy_from(&from, bytes, &stream)?;
        marks.record(&stream)?;
    }
    let copy = Times::of(marks.spans(&stream)?);
    let (clock, memory_clock) = device.clocks();
    Ok(Machine {
        device: device.name.clone(),
        driver: format!("{}.{}", device.driver.0, device.driver.1),
        multiprocessors: device.multiprocessors,
        clock_mhz: clock / 1000,
        memory_clock_mhz: memory_clock / 1000,
        copy_bytes,
        copy,
        bytes_per_second: 2.0 * copy_bytes as f64 / (copy.median_ms * 1e-3),
    })
}
