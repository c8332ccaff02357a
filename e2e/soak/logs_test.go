package soak

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
)

// checkLogs searches what the bots have logged, at the finest level, for what nobody may read there.
func (w *world) checkLogs() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var faults []error
	for i, bot := range w.bots {
		faults = append(faults, bot.CheckLog(mark, password), searchFile(w.logs[i], mark, password))
	}
	return errors.Join(faults...)
}

// searchFile says which lines of a file have one of the words in them.
func searchFile(path string, words ...string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	var faults []error
	lines := bufio.NewReader(file)
	for {
		line, err := lines.ReadBytes('\n')
		for _, word := range words {
			if bytes.Contains(line, []byte(word)) {
				faults = append(faults, fmt.Errorf("%s contains %q: %s", path, word, line))
			}
		}
		if err != nil {
			return errors.Join(faults...)
		}
	}
}
