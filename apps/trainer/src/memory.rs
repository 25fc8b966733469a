//! The memory of this machine.

use std::path::Path;

/// All of it, where the system says so.
pub fn total_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        // SAFETY: `sysconf` only reads.
        let (pages, size) = unsafe {
            (
                libc::sysconf(libc::_SC_PHYS_PAGES),
                libc::sysconf(libc::_SC_PAGESIZE),
            )
        };
        (pages > 0 && size > 0).then(|| pages as u64 * size as u64)
    }
    #[cfg(not(unix))]
    None
}

/// What this process holds now: what is in use of its heap, and the pages of the program.
///
/// Memory that was freed stays with the process (see `main`), and what comes next is put there.
pub fn held_bytes() -> u64 {
    /// Where the system does not say: the program with a tokenizer and a few rows.
    const USUAL: u64 = 24 << 20;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: `mallinfo` only reads the allocator's counters. Those that overflow at 4 GiB are of
        // rows that large; `mallinfo2` would need a newer glibc.
        let heap = unsafe { libc::mallinfo() };
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let used = u64::from(heap.uordblks as u32);
        kib_of(&status, "RssFile:").map_or(USUAL, |program| program + used)
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    USUAL
}

/// What a process can still take without swapping: Linux says it, of the machine and of the control
/// groups that the process is in; other systems do not.
pub fn available_bytes() -> Option<u64> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let machine = available_of_machine(&read("/proc/meminfo"))?;
    let groups = left_in_groups(&read("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
    Some(groups.map_or(machine, |left| machine.min(left)))
}

/// `MemAvailable` of `/proc/meminfo`.
fn available_of_machine(meminfo: &str) -> Option<u64> {
    kib_of(meminfo, "MemAvailable:")
}

/// The bytes of a line `KEY: N kB`.
fn kib_of(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib = rest.trim().strip_suffix("kB")?.trim().parse::<u64>();
    kib.ok().map(|kib| kib * 1024)
}

/// What the limits of the control groups in `/proc/self/cgroup` leave, the tightest of them; nothing
/// if there is no limit.
///
/// Source: the kernel's `admin-guide/cgroup-v2.rst` and `admin-guide/cgroup-v1/memory.rst`.
fn left_in_groups(cgroup: &str, root: &Path) -> Option<u64> {
    let mut left = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (root, files) = match controllers {
            "" => (root.to_owned(), ["memory.max", "memory.current"]),
            _ if controllers.split(',').any(|name| name == "memory") => (
                root.join("memory"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes"],
            ),
            _ => continue,
        };
        // a limit holds for all groups below it
        let groups = Path::new(path.trim_start_matches('/')).ancestors();
        left.extend(groups.filter_map(|group| left_in_group(&root.join(group), files)));
    }
    left.into_iter().min()
}

/// Limit − usage, in which cached files do not count: they make room when it is needed.
fn left_in_group(folder: &Path, [limit, usage]: [&str; 2]) -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).ok();
    let number = |file| read(file)?.trim().parse::<u64>().ok(); // "max" is none
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = read("memory.stat").unwrap_or_default();
    let cached: u64 = ["active_file ", "inactive_file "]
        .iter()
        .filter_map(|key| stat.lines().find_map(|line| line.strip_prefix(key)))
        .filter_map(|bytes| bytes.trim().parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_what_is_available() {
        let text = "MemTotal:       24534420 kB\nMemFree:  100 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(available_of_machine(text), Some(23_000_000 * 1024));
        assert_eq!(available_of_machine("MemTotal: 1 kB\n"), None); // before Linux 3.14
        if cfg!(target_os = "linux") {
            let (available, total) = (available_bytes().unwrap(), total_bytes().unwrap());
            assert!((1..=total).contains(&available), "{available} of {total}");
        }
    }

    #[test]
    fn a_process_holds_something_and_not_everything() {
        let held = held_bytes();
        assert!(held > 1 << 20, "{held}");
        assert!(total_bytes().is_none_or(|total| held < total), "{held}");
    }

    #[test]
    fn the_tightest_group_decides() {
        let root = tempfile::tempdir().unwrap();
        let write = |folder: &str, files: &[(&str, &str)]| {
            let folder = root.path().join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            for (name, content) in files {
                std::fs::write(folder.join(name), content).unwrap();
            }
        };
        let left = |cgroup: &str| left_in_groups(cgroup, root.path());
        assert_eq!(left("0::/a/b\n"), None);
        write(
            "a",
            &[("memory.max", "1000\n"), ("memory.current", "700\n")],
        );
        write(
            "a/b",
            &[("memory.max", "max\n"), ("memory.current", "500\n")],
        );
        assert_eq!(left("0::/a/b\n"), Some(300));
        write(
            "a",
            &[("memory.stat", "anon 10\nactive_file 40\ninactive_file 60\n")],
        );
        assert_eq!(left("0::/a/b\n"), Some(400));
        write("a/b", &[("memory.max", "600\n")]);
        assert_eq!(left("0::/a/b\n"), Some(100));
        assert_eq!(left("0::/\n"), None);
        // the first version, with the group of the container mounted as the root
        let old = [
            ("memory.limit_in_bytes", "900\n"),
            ("memory.usage_in_bytes", "950\n"),
        ];
        write("memory", &old);
        assert_eq!(left("3:cpu:/x\n2:memory,hugetlb:/outside/name\n"), Some(0));
    }
}
