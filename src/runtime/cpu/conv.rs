//! Depthwise causal convolution whose earlier columns are in a ring for each slot.

use anyhow::{Context, Result, ensure};

use super::parallel::{SMALL, chunks};
use super::tensor::{View, byte_len, dims, store_f32};
use crate::plan::TensorType;

/// What a convolution takes besides its state.
pub(super) struct Conv<'a> {
    /// `u [rows, channels]`.
    pub(super) u: &'a [f32],
    pub(super) u_ty: &'a TensorType,
    /// `[channels, taps]`.
    pub(super) weight: View<'a>,
    pub(super) weight_ty: &'a TensorType,
    pub(super) pos: &'a [i32],
    pub(super) slots: &'a [i32],
}

impl Conv<'_> {
    /// The convolution, from the batch's own columns, from the ring's, or from zeros before position 0. Writes nothing.
    pub(super) fn compute(&self, ring: View, ring_ty: &TensorType) -> Result<Vec<f32>> {
        let ([rows, channels], [_, taps]) = (dims(self.u_ty)?, dims(self.weight_ty)?);
        self.check(ring_ty)?;
        let [_, columns, _] = dims(ring_ty)?;
        let u = self.u;
        let weight = self.weight.to_f32()?;
        // Tap by tap, so that channels are adjacent.
        let weight: Vec<f32> = (0..taps * channels).map(|i| weight[i % channels * taps + i / channels]).collect();
        let mut out = vec![0.0; rows * channels];
        chunks(out.len() * taps > SMALL, &mut out, channels, |t, out| {
            let (Ok(slot), Ok(pos)) = (usize::try_from(self.slots[t]), usize::try_from(self.pos[t])) else {
                return Ok(());
            };
            let mut carried = vec![0.0; channels];
            for (tap, weight) in weight.chunks(channels).enumerate() {
                let back = taps - 1 - tap;
                let Some(from) = pos.checked_sub(back) else { continue };
                let column = if self.in_batch(t, back) {
                    &u[(t - back) * channels..][..channels]
                } else {
                    ring.read((slot * columns + from % columns) * channels, &mut carried)?;
                    &carried
                };
                out.iter_mut().zip(weight.iter().zip(column)).for_each(|(out, (w, u))| *out += w * u);
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// True if the row `back` rows earlier holds the column of this row's sequence that many positions earlier.
    fn in_batch(&self, t: usize, back: usize) -> bool {
        t.checked_sub(back).is_some_and(|row| {
            self.slots[row] == self.slots[t] && i64::from(self.pos[row]) == i64::from(self.pos[t]) - back as i64
        })
    }

    fn check(&self, ring_ty: &TensorType) -> Result<()> {
        let ([rows, channels], [weight_channels, taps]) = (dims(self.u_ty)?, dims(self.weight_ty)?);
        let [slots, columns, ring_channels] = dims(ring_ty)?;
        ensure!(
            weight_channels == channels && ring_channels == channels && (1..=columns).contains(&taps),
            "a convolution of {:?} by {:?} with a ring {ring_ty:?}",
            self.u_ty,
            self.weight_ty
        );
        ensure!(self.pos.len() == rows && self.slots.len() == rows, "positions and slots for {rows} rows");
        let highest = self.slots.iter().copied().max().unwrap_or(-1);
        ensure!(i64::from(highest) < slots as i64, "slot {highest} of a state for {slots} sequences");
        Ok(())
    }
}

/// Writes each row's column `u [rows, channels]` to its slot's ring; of rows that share a column the last stays.
pub(super) fn update(u: &[f32], pos: &[i32], slots: &[i32], ring: &mut [u8], ring_ty: &TensorType) -> Result<()> {
    let [_, columns, channels] = dims(ring_ty)?;
    ensure!(ring.len() == byte_len(ring_ty)?, "{} bytes of a ring {ring_ty:?}", ring.len());
    let size = channels * ring_ty.0.bytes() as usize;
    for (u, (&pos, &slot)) in u.chunks(channels.max(1)).zip(pos.iter().zip(slots)) {
        let (Ok(slot), Ok(pos)) = (usize::try_from(slot), usize::try_from(pos)) else { continue };
        let at = (slot * columns + pos % columns) * size;
        let column = ring.get_mut(at..at + size).context("a column outside of the ring")?;
        store_f32(u, ring_ty.0, column)?;
    }
    Ok(())
}
