//! A launcher that starts several processes of a binary that has no MPI.
#![cfg(not(feature = "mpi"))]

use std::process::Command;

#[test]
fn a_binary_without_mpi_says_so() {
    let run = |rank: &str, command: &str| {
        let mut lfm2c = Command::new(env!("CARGO_BIN_EXE_lfm2c"));
        let variables = [("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", rank)];
        let output = lfm2c.args([command, "none.plan"]).envs(variables).output().expect("the binary starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = run("0", "run");
    assert_eq!(code, Some(2), "{text}");
    assert!(
        text.contains("OMPI_COMM_WORLD_SIZE = 2: expected a binary with MPI") && text.contains("--features mpi"),
        "{text}"
    );
    assert_eq!(run("1", "run"), (Some(2), String::new()), "rank 0 tells it");
    let (code, text) = run("0", "inspect");
    assert!(code == Some(2) && text.contains("lfm2c inspect: expected one process"), "{text}");
}
