//! Compiles LFM2 language models into static execution plans, and runs the plans.
//!
//! The rooms, in the order of the pipeline: [`ir`], [`passes`], [`plan`], [`cuda`], [`codegen`], [`runtime`], [`text`], [`cli`].

pub mod cli;
pub mod codegen;
pub mod cuda;
pub mod ir;
pub mod passes;
pub mod plan;
pub mod runtime;
pub mod text;
