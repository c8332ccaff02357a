package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"sendertrust/e2e/secrets"
)

// searchPatience is how long it may take to search all logs.
const searchPatience = 5 * time.Minute

// checkLogs searches what the bots have logged, at the finest level, for every secret that they and the people have: promise 4 of
// docs/reliability.md.
func (w *world) checkLogs() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.bots) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), searchPatience)
	defer cancel()
	set := secrets.NewSet()
	faults := []error{
		set.AddText(secrets.Body, "what people say", mark),
		set.AddText(secrets.Password, "everybody", password),
	}
	for _, bot := range w.bots {
		bot.Kill()
		if err := set.Collect(ctx, bot.ConfigPath()); err != nil {
			// A scene may have left a database that cannot be read any more. What the others have is searched for all the same.
			fmt.Printf("the secrets of %s are not searched for: %v\n", bot.UserID, err)
		}
	}
	var searched int64
	for _, bot := range w.bots {
		faults = append(faults, bot.CheckLog(mark, password))
		// Each run of a bot has a file of its own beside its configuration.
		folder := filepath.Dir(bot.ConfigPath())
		hits, err := set.ScanFolder(folder)
		faults = append(faults, err)
		for _, hit := range hits {
			faults = append(faults, errors.New(hit.String()))
		}
		files, err := filepath.Glob(filepath.Join(folder, "*.log"))
		faults = append(faults, err)
		for _, file := range files {
			if info, err := os.Stat(file); err == nil {
				searched += info.Size()
			}
		}
	}
	fmt.Printf("searched the logs of %d bots, %d MiB, for %d secrets: %d of Megolm, %d of Olm, %d one-time keys, and the others\n", len(w.bots),
		searched>>20, set.Len(), set.Count(secrets.MegolmSession), set.Count(secrets.OlmSession), set.Count(secrets.OneTimeKey))
	if searched == 0 {
		faults = append(faults, errors.New("the bots have written no logs: nothing was searched"))
	}
	return errors.Join(faults...)
}
