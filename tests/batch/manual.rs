//! Completions and manual pages.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::common::{done, fails, read};

/// All long options of a command's help.
fn long_options(help: &str) -> Vec<&str> {
    let starts =
        help.lines().filter_map(|line| line.trim_start().split_once("--").filter(|(before, _)| before.len() <= 4));
    starts.filter_map(|(_, name)| name.split([' ', '=', ',', '[']).next()).filter(|name| !name.is_empty()).collect()
}

#[test]
fn completions_and_manual_pages_know_every_command_and_option() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let at = folder.path();
    done(at, &["man", "-o", "man"]);
    let main = done(at, &["man"]);
    assert_eq!(main.as_bytes(), read(at, "man/lfm2c.1"));
    let help = done(at, &["--help"]);
    let commands = help.split("Commands:\n").nth(1).expect("commands").split("\n\n").next().expect("a list");
    let first_lines = commands.lines().filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let commands: Vec<&str> = first_lines.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.contains(&"run") && commands.contains(&"man"), "{commands:?}");
    let shells =
        ["bash", "zsh", "fish", "elvish", "powershell"].map(|shell| (shell, done(at, &["completions", shell])));
    for command in commands.into_iter().filter(|&command| command != "help") {
        assert!(main.contains(&format!("lfm2c\\-{command}(1)")), "{command}");
        let page = String::from_utf8(read(at, &format!("man/lfm2c-{command}.1"))).expect("UTF-8");
        let help = done(at, &[command, "--help"]);
        let options = long_options(&help);
        assert!(options.contains(&"help"), "{command}: {options:?}");
        for option in options {
            assert!(page.contains(&format!("\\-\\-{}", option.replace('-', "\\-"))), "{command} --{option}");
            for (shell, script) in &shells {
                assert!(script.contains(option), "{shell}: {command} --{option}");
            }
        }
    }
    assert!(fails(at, 2, &["completions", "no-such-shell"]).contains("bash"));
    // A script is read without a fault by the shell that it is for, where there is one.
    for (shell, script) in &shells[..3] {
        let child = Command::new(shell).arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let Ok(mut child) = child else { continue };
        child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
    }
}
