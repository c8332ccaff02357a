package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"sendertrust/bench/figures"
)

// machine describes what the figures are made on. What cannot be found out stays empty.
func machine(withReference bool) figures.Machine {
	m := figures.Machine{
		Processor: field("/proc/cpuinfo", "model name"), Processors: runtime.NumCPU(),
		System: runtime.GOOS + " " + firstLine("/proc/sys/kernel/osrelease"), Go: runtime.Version(), Mautrix: moduleVersion("maunium.net/go/mautrix"),
	}
	if memory := strings.Fields(field("/proc/meminfo", "MemTotal")); len(memory) > 0 {
		kib, _ := strconv.Atoi(memory[0])
		m.MemoryMiB = kib >> 10
	}
	if withReference {
		m.Reference = "matrix-sdk-crypto " + lockedVersion("bench/reference/Cargo.lock", "matrix-sdk-crypto")
	}
	return m
}

// field gives the value of the first line "name : value" of a file.
func field(file, name string) string {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if key, value, found := strings.Cut(line, ":"); found && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func firstLine(file string) string {
	text, _ := os.ReadFile(file)
	line, _, _ := strings.Cut(string(text), "\n")
	return line
}

func moduleVersion(path string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	for _, module := range info.Deps {
		if module.Path == path {
			return module.Version
		}
	}
	return ""
}

// lockedVersion reads a package's version from a Cargo.lock.
func lockedVersion(file, name string) string {
	text, _ := os.ReadFile(file)
	_, rest, _ := strings.Cut(string(text), "name = \""+name+"\"\nversion = \"")
	version, _, _ := strings.Cut(rest, "\"")
	return version
}
