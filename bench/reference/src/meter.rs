//! What this process takes: time, processors' time and memory.
use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

/// Measures what happens between `begin` and `end`, however often.
pub struct Meter {
    wall: Duration,
    cpu: Duration,
    began: (Instant, Duration),
}

impl Meter {
    /// Gives freed memory back, and sets the peak of the memory to what is resident now.
    pub fn new() -> Self {
        trim();
        let _ = fs::write("/proc/self/clear_refs", "5");
        Meter { wall: Duration::ZERO, cpu: Duration::ZERO, began: (Instant::now(), cpu_time()) }
    }

    pub fn begin(&mut self) {
        self.began = (Instant::now(), cpu_time());
    }

    pub fn end(&mut self) {
        self.wall += self.began.0.elapsed();
        self.cpu += cpu_time() - self.began.1;
    }

    /// Gives how long each of so many took.
    pub fn figure(&self, work: &str, count: usize) -> Map<String, Value> {
        let each = |took: Duration| took.as_secs_f64() * 1e6 / count as f64;
        let figure = json!({
            "work": work, "count": count, "us_each": each(self.wall), "cpu_us_each": each(self.cpu),
            "peak_kib": status_kib("VmHWM:"),
        });
        figure.as_object().unwrap().clone()
    }
}

fn cpu_time() -> Duration {
    // SAFETY: getrusage only fills the struct.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let duration = |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
    duration(usage.ru_utime) + duration(usage.ru_stime)
}

fn trim() {
    // SAFETY: malloc_trim only gives free pages back.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What is resident once freed memory is given back.
pub fn resident_kib() -> u64 {
    trim();
    status_kib("VmRSS:")
}

/// What is allocated and not freed, by Rust and by SQLite; 0 where the C library cannot say it.
pub fn live_kib() -> u64 {
    // SAFETY: mallinfo2 only counts.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        let allocated = libc::mallinfo2();
        (allocated.uordblks + allocated.hblkhd) as u64 >> 10
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    0
}

fn status_kib(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find(|line| line.starts_with(name))
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|value| value.parse().ok())
        .unwrap_or(0)
}
