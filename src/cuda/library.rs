//! Where NVIDIA's libraries are outside of the loader's path.

use std::path::PathBuf;

/// The places of a library file, best first: the toolkit's folders, then the Python package that has it in `nvidia/{package}/lib`.
pub(super) fn places(file: &str, package: &str) -> Vec<PathBuf> {
    let home = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let mut folders: Vec<PathBuf> = [home("CUDA_PATH"), home("CUDA_HOME"), Some("/usr/local/cuda".into())]
        .into_iter()
        .flatten()
        .flat_map(|root| [root.join("lib64"), root.join("lib")])
        .collect();
    let pythons = [
        home("VIRTUAL_ENV"),
        home("HOME").map(|home| home.join(".local")),
        Some("/usr/local".into()),
        Some("/usr".into()),
    ];
    for lib in pythons.into_iter().flatten().map(|root| root.join("lib")) {
        let versions = std::fs::read_dir(&lib).into_iter().flatten().flatten();
        let versions = versions.filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
        for version in versions {
            for packages in ["site-packages", "dist-packages"] {
                folders.push(version.path().join(packages).join("nvidia").join(package).join("lib"));
            }
        }
    }
    folders.into_iter().map(|folder| folder.join(file)).collect()
}
