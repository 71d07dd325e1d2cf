//! Tests of operators against naive references in f64, and of the executor on programs built by hand.

mod executor;
mod experts;
mod pointwise;
mod sequence;
mod simple;

use std::ops::Range;

use super::interpret::{Input, interpret};
use super::tensor::{Value, View, byte_len, round, store_f32};
use crate::plan::{DType, Instr, Op, Semantic, Slot, TensorType};

pub(super) const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

pub(super) fn ty(dtype: DType, shape: &[usize]) -> TensorType {
    TensorType(dtype, shape.iter().map(|&n| n as u64).collect())
}

/// Reproducible numbers in [-1, 1), rounded to a type.
pub(super) fn noise(seed: u64, count: usize, dtype: DType) -> Vec<f32> {
    let mut x: Vec<f32> = (0..count as u64).map(|i| crate::runtime::sampling::uniform(seed, i) * 2.0 - 1.0).collect();
    round(&mut x, dtype);
    x
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Fails unless each element is within `tolerance`, relative to the larger of 1 and its magnitude.
#[track_caller]
pub(super) fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= tolerance * expected.abs().max(1.0), "element {i}: expected {expected}, found {found}");
    }
}

/// The rounding error that a type allows.
pub(super) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.0 / 200.0,
        DType::F16 => 1.0 / 1500.0,
        _ => 2e-5,
    }
}

/// One operator with its operands, in words so that every type is aligned.
#[derive(Clone, Default)]
pub(super) struct Case {
    types: Vec<TensorType>,
    values: Vec<Operand>,
    state: Vec<u32>,
}

#[derive(Clone)]
enum Operand {
    Words(Vec<u32>),
    State(Range<usize>),
}

impl Case {
    pub(super) fn floats(mut self, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let ty = ty(dtype, shape);
        let mut words = vec![0u32; byte_len(&ty).unwrap().div_ceil(4)];
        let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..byte_len(&ty).unwrap()];
        store_f32(values, dtype, bytes).unwrap();
        self.types.push(ty);
        self.values.push(Operand::Words(words));
        self
    }

    pub(super) fn ints(mut self, shape: &[usize], values: &[i32]) -> Self {
        self.types.push(ty(DType::I32, shape));
        self.values.push(Operand::Words(bytemuck::cast_slice(values).to_vec()));
        self
    }

    /// A state, poisoned.
    pub(super) fn state(mut self, dtype: DType, shape: &[usize]) -> Self {
        let ty = ty(dtype, shape);
        let (start, len) = (self.state.len() * 4, byte_len(&ty).unwrap());
        self.state.resize(self.state.len() + len.div_ceil(4), u32::MAX);
        self.types.push(ty);
        self.values.push(Operand::State(start..start + len));
        self
    }

    /// A state with these contents.
    pub(super) fn table(mut self, shape: &[usize], values: &[i32]) -> Self {
        let start = self.state.len() * 4;
        self.state.extend(values.iter().map(|&x| x as u32));
        self.types.push(ty(DType::I32, shape));
        self.values.push(Operand::State(start..start + values.len() * 4));
        self
    }

    /// Replaces an operand's type and contents by those of another case's last operand.
    pub(super) fn replace(&mut self, operand: usize, with: Case) {
        self.types[operand] = with.types.last().unwrap().clone();
        self.values[operand] = with.values.last().unwrap().clone();
    }

    pub(super) fn state_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.state)
    }

    /// Runs the operator on all operands; state stays changed.
    pub(super) fn run(&mut self, op: Op, outputs: &[TensorType]) -> anyhow::Result<Vec<Value>> {
        let args = (0..self.types.len() as u32).map(Slot::In).collect();
        let results = (0..outputs.len() as u32).map(Slot::Out).collect();
        self.body(vec![Instr(op, args, results)], outputs, &[])
    }

    /// Runs operators; state stays changed.
    pub(super) fn body(
        &mut self,
        body: Vec<Instr>,
        outputs: &[TensorType],
        temps: &[TensorType],
    ) -> anyhow::Result<Vec<Value>> {
        let semantic = Semantic {
            name: "test".into(),
            inputs: self.types.clone(),
            outputs: outputs.to_vec(),
            temps: temps.to_vec(),
            body,
        };
        let inputs = self.values.iter().zip(&self.types).map(|(value, ty)| match value {
            Operand::Words(words) => {
                let bytes = &bytemuck::cast_slice(words)[..byte_len(ty).unwrap()];
                Input::View(View::new(bytes, ty.0).unwrap())
            }
            Operand::State(range) => Input::State(range.clone()),
        });
        interpret(&semantic, inputs.collect(), bytemuck::cast_slice_mut(&mut self.state)).map(|made| made.outputs)
    }

    pub(super) fn run_f32(&mut self, op: Op, dtype: DType, shape: &[usize]) -> Vec<f32> {
        floats(&self.run(op, &[ty(dtype, shape)]).unwrap()[0])
    }
}

pub(super) fn floats(value: &Value) -> Vec<f32> {
    match value {
        Value::F32(x) => x.clone(),
        Value::I32(x) => panic!("expected numbers, found {x:?}"),
    }
}

pub(super) fn ints(value: &Value) -> Vec<i32> {
    match value {
        Value::I32(x) => x.clone(),
        Value::F32(x) => panic!("expected integers, found {x:?}"),
    }
}
