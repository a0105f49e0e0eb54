"""Colors of the window, light and dark, by what the desktop asks for."""

from PySide6.QtCore import Qt
from PySide6.QtGui import QColor, QGuiApplication, QPalette
from PySide6.QtWidgets import QApplication

_ROLES = {
    # role: (light, dark)
    QPalette.ColorRole.Window: ("#f6f3ee", "#181614"),
    QPalette.ColorRole.WindowText: ("#211d19", "#f2ece3"),
    QPalette.ColorRole.Base: ("#ffffff", "#23201d"),
    QPalette.ColorRole.AlternateBase: ("#efeae2", "#2b2723"),
    QPalette.ColorRole.Text: ("#211d19", "#f2ece3"),
    QPalette.ColorRole.PlaceholderText: ("#6d655b", "#aaa195"),
    QPalette.ColorRole.Button: ("#ffffff", "#2b2723"),
    QPalette.ColorRole.ButtonText: ("#211d19", "#f2ece3"),
    QPalette.ColorRole.Highlight: ("#b93a1f", "#ff9178"),
    QPalette.ColorRole.HighlightedText: ("#ffffff", "#2a0f08"),
    QPalette.ColorRole.ToolTipBase: ("#211d19", "#f2ece3"),
    QPalette.ColorRole.ToolTipText: ("#f6f3ee", "#181614"),
    QPalette.ColorRole.Mid: ("#d8d0c4", "#4a443d"),
}

_STYLE = """
* { font-size: 14px; }
QLineEdit { background: palette(base); border: 1px solid palette(mid); border-radius: 8px; padding: 7px 10px;
    selection-background-color: palette(highlight); selection-color: palette(highlighted-text); }
QLineEdit:focus { border: 2px solid palette(highlight); padding: 6px 9px; }
QLineEdit#prompt { font-size: 18px; padding: 10px 14px; }
QLineEdit#prompt:focus { padding: 9px 13px; }
QPushButton { background: palette(button); border: 1px solid palette(mid); border-radius: 8px; padding: 7px 16px; }
QPushButton:hover { border-color: palette(placeholder-text); }
QPushButton:focus { border: 2px solid palette(highlight); padding: 6px 15px; }
QPushButton:disabled { color: palette(placeholder-text); }
QPushButton#draw { background: palette(highlight); color: palette(highlighted-text); font-size: 16px; font-weight: 600;
    padding: 11px 26px; border: none; }
QPushButton#draw:disabled { background: palette(mid); color: palette(window-text); }
QPushButton#draw:focus { border: 2px solid palette(window-text); padding: 9px 24px; }
QListWidget { background: palette(alternate-base); border: none; border-radius: 10px; padding: 4px; }
QListWidget::item { border-radius: 8px; padding: 3px; border: 2px solid transparent; }
QListWidget::item:selected { border: 2px solid palette(highlight); background: palette(base); }
QScrollBar:horizontal { background: transparent; height: 10px; margin: 2px 6px; }
QScrollBar::handle:horizontal { background: palette(mid); border-radius: 3px; min-width: 40px; }
QScrollBar::add-line, QScrollBar::sub-line { width: 0; }
QProgressBar { background: palette(alternate-base); border: none; border-radius: 3px; }
QProgressBar::chunk { background: palette(highlight); border-radius: 3px; }
QLabel#quiet { color: palette(placeholder-text); }
QLabel#notice { background: palette(base); border: 1px solid palette(highlight); border-radius: 8px;
    padding: 8px 12px; }
"""


def dress(application: QApplication) -> None:
    """Set style and colors, and follow the desktop when it changes between light and dark."""
    application.setStyle("Fusion")
    hints = QGuiApplication.styleHints()
    hints.colorSchemeChanged.connect(lambda scheme: apply(application, scheme == Qt.ColorScheme.Dark))
    apply(application, hints.colorScheme() == Qt.ColorScheme.Dark)


def apply(application: QApplication, dark: bool) -> None:
    """Set the light or the dark colors."""
    palette = QPalette()
    for role, colors in _ROLES.items():
        palette.setColor(role, QColor(colors[dark]))
    application.setPalette(palette)
    application.setStyleSheet(_STYLE)
