package bot

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"sendertrust/cryptohook"
)

// The operator is told what is in the way of the backup, and what to do. What goes right is not told.
func TestAdviceOnTheBackupSaysWhatToDo(t *testing.T) {
	for _, c := range []struct {
		err   error
		words []string
	}{
		{fmt.Errorf("%w: some more", cryptohook.ErrOthersBackup), []string{"left alone", "delete it in a Matrix app", "account.recovery_key"}},
		{fmt.Errorf("%w: some more", cryptohook.ErrStorageKeyNeeded), []string{"not backed up", "write the bot's recovery key into account.recovery_key"}},
		{errors.New("502"), []string{"not backed up", "tries again by itself"}},
	} {
		for _, word := range c.words {
			if advice := adviceOnBackup(c.err); !strings.Contains(advice, word) {
				t.Errorf("%v: %q does not say %q", c.err, advice, word)
			}
		}
	}
	if advice := adviceOnBackup(nil); advice != "" {
		t.Errorf("says %q when all is well", advice)
	}
}
