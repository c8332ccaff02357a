package bot

import (
	"context"
	"errors"
	"slices"

	"maunium.net/go/mautrix/crypto/ssss"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// keepBackup has the account's key backup kept, which the bot's next machine gets its keys from. storage is the account's secret storage; nil
// if the recovery key is not at hand. Without a backup the bot works as well; what is in the way is told once.
func (b *Bot) keepBackup(ctx context.Context, storage *ssss.Key) {
	if storage == nil && b.hasRecoveryKey() {
		var err error
		if storage, err = b.openSecrets(ctx); err != nil {
			b.log.Warn().Err(err).Msg("The account's secret storage cannot be opened, so that the bot cannot look there for the key of the account's key backup")
			_ = b.hook.KeepBackup(ctx, nil) // it may have been kept before
			return
		}
	}
	err := b.hook.KeepBackup(ctx, storage)
	advice := adviceOnBackup(err)
	if advice == b.backupAdvice {
		return
	}
	b.backupAdvice = advice
	if advice != "" {
		b.log.Warn().Err(err).Msg(advice)
	}
}

// adviceOnBackup tells the operator why keys are not backed up, and what to do. Empty: they are.
func adviceOnBackup(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, cryptohook.ErrOthersBackup):
		return "The account has a key backup on the homeserver that another program has made, and the bot has no key to it: it is left alone, and the bot's own keys are not backed up. " +
			"If you know that nobody needs that backup, delete it in a Matrix app that is logged in to the account (in Element: Settings, Encryption), and start the bot again with its recovery key in account.recovery_key"
	case errors.Is(err, cryptohook.ErrStorageKeyNeeded):
		return "The bot's keys are not backed up on the homeserver, so that without its database it could not read older messages. " +
			"To have them backed up, write the bot's recovery key into account.recovery_key, and start it again"
	default:
		return "The bot's keys are not backed up on the homeserver yet; it tries again by itself"
	}
}

// mostDevicesTold is how many of the account's other devices are told by their IDs.
const mostDevicesTold = 50

// tellOfOtherDevices logs which other logins the account has: those of earlier machines of the bot are no use any more, and others may be
// somebody's who has no business there. The bot logs nobody out.
func (b *Bot) tellOfOtherDevices(ctx context.Context) {
	listed, err := b.client.GetDevicesInfo(ctx)
	if err != nil {
		b.log.Debug().Err(err).Msg("The homeserver does not say which other devices the account has")
		return
	}
	var others []id.DeviceID
	for _, device := range listed.Devices {
		if device.DeviceID != b.client.DeviceID {
			others = append(others, device.DeviceID)
		}
	}
	if len(others) == 0 {
		return
	}
	slices.Sort(others)
	b.log.Info().Int("other_devices", len(others)).Any("device_ids", others[:min(len(others), mostDevicesTold)]).
		Msg("The account has other devices. Log out those that nobody uses, in a Matrix app that is logged in to the account")
}
