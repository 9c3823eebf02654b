//! The memory of the host: the smaller of the machine's memory and the limits of the process's
//! control groups (v2, v1). No crate walks the ancestors of a control group.

use std::fs;
use std::path::Path;

/// Assumed where the kernel shows neither: enough to run, and not too much for a small machine.
const MEMORY_UNKNOWN_BYTES: u64 = 1 << 30;

/// Bytes of memory that this process may use.
pub(super) fn memory() -> u64 {
    memory_at(Path::new("/"))
}

fn memory_at(root: &Path) -> u64 {
    let machine = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| meminfo_total(&text));
    let group = fs::read_to_string(root.join("proc/self/cgroup"))
        .ok()
        .and_then(|text| cgroup_limit(root, &text));
    match (machine, group) {
        (Some(a), Some(b)) => a.min(b),
        (Some(a), None) | (None, Some(a)) => a,
        (None, None) => MEMORY_UNKNOWN_BYTES,
    }
}

fn meminfo_total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The smallest limit on the way from the process's groups to the root.
fn cgroup_limit(root: &Path, memberships: &str) -> Option<u64> {
    let fs_root = root.join("sys/fs/cgroup");
    memberships
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            if controllers.is_empty() {
                smallest_upward(&fs_root, path, "memory.max")
            } else if controllers.split(',').any(|c| c == "memory") {
                smallest_upward(&fs_root.join("memory"), path, "memory.limit_in_bytes")
            } else {
                None
            }
        })
        .min()
}

fn smallest_upward(mount: &Path, group: &str, file: &str) -> Option<u64> {
    let group = Path::new(group.trim_start_matches('/'));
    // Inside a container the path may name a group that is not mounted. The limit is then at the
    // root of the mount.
    group
        .ancestors()
        .filter_map(|dir| fs::read_to_string(mount.join(dir).join(file)).ok())
        .filter_map(|text| text.trim().parse::<u64>().ok())
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that is removed with the test.
    struct Tree(std::path::PathBuf);
    impl Tree {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let dir = std::env::temp_dir().join(format!("tidegate-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = dir.join(path);
                fs::create_dir_all(path.parent().expect("has a parent")).expect("dir");
                fs::write(path, text).expect("file");
            }
            Self(dir)
        }
    }
    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: &str = "MemTotal:        8000000 kB\nMemFree: 1 kB\n";

    #[test]
    fn machine_memory_without_groups() {
        let tree = Tree::new("mem0", &[("proc/meminfo", MEMINFO)]);
        assert_eq!(memory_at(&tree.0), 8_000_000 * 1024);
    }

    #[test]
    fn cgroup_v2_takes_the_tightest_ancestor() {
        let tree = Tree::new(
            "mem2",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/a/b\n"),
                ("sys/fs/cgroup/a/memory.max", "1048576\n"),
                ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ],
        );
        assert_eq!(memory_at(&tree.0), 1_048_576);
    }

    #[test]
    fn cgroup_v2_in_a_container_reads_the_mount_root() {
        let tree = Tree::new(
            "mem3",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/not/mounted\n"),
                ("sys/fs/cgroup/memory.max", "2097152\n"),
            ],
        );
        assert_eq!(memory_at(&tree.0), 2_097_152);
    }

    #[test]
    fn cgroup_v1_unlimited_is_the_machine() {
        let tree = Tree::new(
            "mem1",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "5:cpu,memory:/x\n"),
                (
                    "sys/fs/cgroup/memory/x/memory.limit_in_bytes",
                    "9223372036854771712\n",
                ),
            ],
        );
        assert_eq!(memory_at(&tree.0), 8_000_000 * 1024);
    }

    #[test]
    fn nothing_known() {
        let tree = Tree::new("mem9", &[("x", "")]);
        assert_eq!(memory_at(&tree.0), MEMORY_UNKNOWN_BYTES);
    }
}
